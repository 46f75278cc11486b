"""As much of a Kubernetes API server as Helm's `lookup` asks: discovery, and objects by name or as a list."""

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Object = dict[str, Any]
KINDS = {
    "v1": dict.fromkeys(("ConfigMap", "Secret", "PersistentVolumeClaim", "ServiceAccount", "Service", "Pod"), True),
    "networking.k8s.io/v1": {"NetworkPolicy": True},
    "rbac.authorization.k8s.io/v1": {"Role": True, "RoleBinding": True},
    "ray.io/v1": {"RayJob": True},
    "storage.k8s.io/v1": {"StorageClass": False},
    "kueue.x-k8s.io/v1beta1": {"LocalQueue": True},
    "apiregistration.k8s.io/v1": {"APIService": False},
}
"""Whether a kind is namespaced, by version."""


def plural(kind: str) -> str:
    return kind.lower().removesuffix("y") + ("ies" if kind.endswith("y") else "es" if kind.endswith("s") else "s")


def answer(path: str, objects: Sequence[Object]) -> Object | None:
    """What a GET of the path finds."""
    groups = [{"name": version.split("/")[0], "versions": [{"groupVersion": version, "version": version.split("/")[1]}],
               "preferredVersion": {"groupVersion": version, "version": version.split("/")[1]}}
              for version in KINDS if "/" in version]  # fmt: skip
    fixed: dict[str, Object] = {
        "/version": {"major": "1", "minor": "34", "gitVersion": "v1.34.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups},
    }
    if path in fixed:
        return fixed[path]
    for version, kinds in KINDS.items():
        base = f"/apis/{version}" if "/" in version else f"/api/{version}"
        if path == base:
            verbs = ["get", "list"]
            found = [{"name": plural(kind), "singularName": "", "kind": kind, "namespaced": own, "verbs": verbs}
                     for kind, own in kinds.items()]  # fmt: skip
            return {"kind": "APIResourceList", "groupVersion": version, "resources": found}
        for kind in kinds:
            held = [item for item in objects if item["kind"] == kind]
            parts = path.removeprefix(base).strip("/").split("/")
            parts = parts[2:] if parts[0] == "namespaces" else parts
            if path.startswith(base + "/") and parts[0] == plural(kind):
                if len(parts) == 1:
                    return {"kind": f"{kind}List", "apiVersion": version, "items": held}
                return next((item for item in held if item["metadata"]["name"] == parts[1]), None)
    return None


@contextlib.contextmanager
def api_server(folder: Path, objects: Sequence[Object]) -> Iterator[Path]:
    """A kubeconfig for a server that has these objects, in every namespace."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = answer(self.path.partition("?")[0], objects)
            missing = {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}
            body = json.dumps(found or missing).encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = folder / "kubeconfig"
    cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
    context = {"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "team"}}
    users = [{"name": "u", "user": {}}]
    made = {"apiVersion": "v1", "kind": "Config", "clusters": [cluster], "contexts": [context], "users": users}
    config.write_text(json.dumps(made | {"current-context": "c"}))
    try:
        yield config
    finally:
        server.shutdown()
        server.server_close()
