"""What is generated around the chart: its schema, its plain manifests, its dashboards, its README."""
