"""kubectl and helm as commands with deadlines, and what they say when they fail, in a sentence."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpo.config.text import clean, short
from grpo.errors import ClusterError, ConfigError, DeadlineExceeded, GrpoError

ANSWER_SECONDS = 30.0
"""Longest wait for one answer of the cluster."""
VALUED = ("-n", "--context", "--kube-context", "-o", "-l", "-c", "-p", "--type")
"""Options whose value is the next word."""
LONGEST = 400
"""Characters of what a program said."""
INSTALL = {"kubectl": "https://kubernetes.io/docs/tasks/tools", "helm": "https://helm.sh/docs/intro/install"}
UNREACHABLE = re.compile(
    "unable to connect|connection refused|connection reset|was refused|i/o timeout|no such host|handshake timeout|"
    "deadline exceeded|timed out|unreachable|no route to host|unexpected EOF|: EOF|unable to handle the request|"
    "Service ?Unavailable|TooManyRequests|etcdserver",
    re.IGNORECASE,
)
NO_CONTEXT = re.compile(
    "no configuration has been provided|missing or incomplete configuration|invalid configuration|error loading config|"
    "context .*(does not exist|not found)|stat .*: no such file|localhost:8080|must specify (--)?server",
    re.IGNORECASE,
)
REFUSED = re.compile("forbidden|unauthorized|must be logged in|provide credentials|certificate", re.IGNORECASE)
NO_RELEASE = re.compile("release: not found")
NO_KUBERAY = re.compile("doesn't have a resource type|could not find the requested resource|no matches for kind")

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cluster:
    """A namespace of a cluster; None: those that kubectl's configuration names."""

    namespace: str | None = None
    context: str | None = None

    def kubectl(self, *arguments: str, seconds: float = ANSWER_SECONDS) -> str:
        """What kubectl prints. Raises ConfigError, ClusterError or DeadlineExceeded, a sentence each."""
        return self._run(self.command("kubectl", *arguments), seconds)

    def helm(self, *arguments: str, seconds: float = ANSWER_SECONDS) -> str:
        """What helm prints. Raises as `kubectl`."""
        return self._run(self.command("helm", *arguments), seconds)

    def objects(self, kind: str, *arguments: str) -> list[Object]:
        """All objects of a kind, by kubectl."""
        text = self.kubectl("get", kind, "-o", "json", *arguments)
        try:
            items: list[Object] = json.loads(text)["items"]
        except (ValueError, KeyError, TypeError):
            raise ClusterError(
                f"kubectl get {kind} must print a list in JSON, but printed {short(text)!r}; look at what it prints"
            ) from None
        return items

    def command(self, program: str, *arguments: str) -> list[str]:
        """The program for this cluster and namespace. Raises ConfigError where it is not on the PATH."""
        found = shutil.which(program)
        if found is None:
            raise ConfigError(f"{program} must be on the PATH, but is not; install it: {INSTALL[program]}")
        context = {"kubectl": "--context", "helm": "--kube-context"}[program]
        chosen = [context, self.context] if self.context else []
        return [found, *chosen, *(["-n", self.namespace] if self.namespace else []), *arguments]

    def told(self) -> str:
        """These choices as options, each with a space before it, for a command that is shown."""
        options = {"--context": self.context, "-n": self.namespace}
        return "".join(f" {name} {value}" for name, value in options.items() if value)

    def namespace_name(self) -> str:
        """The namespace, also where only kubectl's configuration names it."""
        if self.namespace:
            return self.namespace
        return self.kubectl("config", "view", "--minify", "-o", "jsonpath={..namespace}").strip() or "default"

    def _run(self, command: Sequence[str], seconds: float) -> str:
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            raise DeadlineExceeded(
                f"{told(command)} must answer within {seconds:g} s, but did not; try again, or look at "
                "`kubectl cluster-info`"
            ) from None
        except OSError as error:
            raise ConfigError(f"{command[0]} must be a program, but cannot be run: {error}; install it anew") from error
        out, said = (stream.decode(errors="replace") for stream in (done.stdout, done.stderr))
        if done.returncode:
            raise failure(command, said or out, done.returncode)
        return out


def told(command: Sequence[str]) -> str:
    """A command as a message names it: its program, its verb, and what that is about."""
    pairs = zip(command[1:], command, strict=False)
    words = [word for word, before in pairs if not word.startswith("-") and before not in VALUED]
    return " ".join([command[0].rpartition("/")[2], *words[:3]])


def failure(command: Sequence[str], said: str, code: int) -> GrpoError:
    """The error that a failed command is: what has to be changed, or what may come by itself."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    line = clean(lines[-1] if lines else f"nothing, with exit code {code}")[:LONGEST]
    if NO_CONTEXT.search(said):
        rule, way = (
            "kubectl must know a cluster",
            "set KUBECONFIG or --context; `kubectl config get-contexts` lists them",
        )
    elif NO_KUBERAY.search(said):
        rule, way = (
            "the cluster must have RayJobs",
            "install the KubeRay operator (docs/kubernetes.md), or name another --context",
        )
    elif REFUSED.search(said):
        rule, way = "you must be allowed to", "log in, ask for the role, or name your namespace with -n"
        rule = f"{rule} {told(command)}"
    elif UNREACHABLE.search(said):
        return ClusterError(f"the cluster must answer, but: {line}; try again, or look at `kubectl cluster-info`")
    elif NO_RELEASE.search(said):
        rule, way = f"{told(command)} must know the release", "look for it with `helm list -A`"
    else:
        return ClusterError(f"{told(command)} must succeed, but: {line}; try it by hand")
    return ConfigError(f"{rule}, but: {line}; {way}")
