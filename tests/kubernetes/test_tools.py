"""kubectl and helm fail in many ways; each is one sentence and an exit code."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.config.text import clean
from grpo.errors import ClusterError, ConfigError, DeadlineExceeded, GrpoError
from grpo.kubernetes.tools import Cluster, failure, told
from tests.kubernetes.programs import Programs

SAID = {
    "The connection to the server localhost:8080 was refused - did you specify the right host or port?": (
        2,
        "KUBECONFIG",
    ),
    'error: context "x" does not exist': (2, "--context"),
    "Error: kubernetes cluster unreachable: the server has asked for the client to provide credentials": (2, "log in"),
    "Unable to connect to the server: dial tcp 10.0.0.1:443: i/o timeout": (10, "cluster-info"),
    "The connection to the server 10.0.0.1:6443 was refused - did you specify the right host or port?": (
        10,
        "try again",
    ),
    'error: the server doesn\'t have a resource type "rayjobs"': (2, "KubeRay"),
    'Error from server (Forbidden): rayjobs.ray.io is forbidden: User "a" cannot list resource': (2, "be allowed to"),
    "error: You must be logged in to the server (Unauthorized)": (2, "log in"),
    "Error: release: not found": (2, "helm list -A"),
    'Error from server (NotFound): pods "x" not found': (10, "must succeed"),
    "W0101 memcache.go: a warning\nError from server (BadRequest): container is waiting to start": (
        10,
        "waiting to start",
    ),
    "": (10, "exit code 3"),
}


@pytest.mark.parametrize("said", SAID)
def test_what_a_program_says_becomes_a_sentence(said: str, programs: Programs) -> None:
    programs.answer("get", {"err": said, "code": 3})
    with pytest.raises(GrpoError) as raised:
        Cluster().kubectl("get", "rayjobs.ray.io")
    code, way = SAID[said]
    assert (raised.value.exit_code, way in str(raised.value), "\n" in str(raised.value)) == (code, True, False)


def test_a_program_that_is_not_there(programs: Programs) -> None:
    for name in ("kubectl", "helm"):
        (programs.folder / name).unlink()
    with pytest.raises(ConfigError, match="kubectl must be on the PATH, but is not; install it: https://kubernetes.io"):
        Cluster().kubectl("get", "pods")
    with pytest.raises(ConfigError, match="helm must be on the PATH, but is not; install it: https://helm.sh"):
        Cluster().helm("list")


def test_one_that_does_not_answer_or_not_in_json(programs: Programs) -> None:
    programs.answer("slow", {"seconds": 30})
    with pytest.raises(DeadlineExceeded, match="kubectl get slow must answer within 0.5 s"):
        Cluster().kubectl("get", "slow", seconds=0.5)
    for out in ("no json", "[]", "{}", "3"):
        programs.answer("pods", {"out": out})
        with pytest.raises(ClusterError, match="kubectl get pods must print a list in JSON"):
            Cluster().objects("pods")


def test_the_namespace_and_the_context_go_to_both(programs: Programs) -> None:
    programs.answer("", {"out": '{"items": []}'})
    there = Cluster("team", "prod")
    there.objects("pods", "-l", "a=b")
    there.helm("get", "notes", "x")
    assert programs.calls() == [
        ["kubectl", "--context", "prod", "-n", "team", "get", "pods", "-o", "json", "-l", "a=b"],
        ["helm", "--kube-context", "prod", "-n", "team", "get", "notes", "x"],
    ]
    assert there.told() == " --context prod -n team" and Cluster().told() == ""


@given(st.text(max_size=400), st.integers(1, 255))
def test_whatever_it_says_is_one_printable_line(said: str, code: int) -> None:
    error = failure(["/usr/bin/kubectl", "get", "pods"], said, code)
    assert isinstance(error, ConfigError | ClusterError)
    assert str(error) == clean(str(error)) and len(str(error)) < 4000


def test_a_command_is_named_by_its_words() -> None:
    assert told(["/bin/kubectl", "-n", "team", "get", "pods", "-o", "json"]) == "kubectl get pods"
