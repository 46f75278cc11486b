"""A run of the chart as a person at a terminal meets it: values, state, log, results, end; by kubectl and helm."""
