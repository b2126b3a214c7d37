"""Claims about launch/ray-job.sh: a run submitted to a cluster, resumed by the same command, stopped, refused."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dist_mlpl.tools.audit import audit
from tests.support.runs import REPOSITORY, tiny_config, tiny_shards, write_config

pytestmark = pytest.mark.cluster

SCRIPT = REPOSITORY / "launch" / "ray-job.sh"
BIN = Path(sys.executable).parent


class Cluster(NamedTuple):
    """A Ray head on this machine that knows one token."""

    address: str
    environment: dict[str, str]  # for commands that may use it
    log: Path


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, all different, between those of Ray's workers (10002-19999) and those that the kernel
    gives outgoing connections (32768 and up): nobody takes one of them before it is used.
    """
    ports: list[int] = []
    candidate = 20_000 + secrets.randbelow(12_000)
    while len(ports) < count:
        candidate += 1
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", candidate)) != 0:
                ports.append(candidate)
    return ports


def bare_environment(home: Path) -> dict[str, str]:
    """This process's environment without a word about any cluster; no token lies in `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLPL_"))}
    return kept | {"HOME": str(home), "MLPL_BIN": str(BIN), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def answers(cluster: Cluster, path: str) -> bool:
    """Whether the dashboard, and behind it the job server, takes requests."""
    token = cluster.environment["RAY_AUTH_TOKEN"]
    request = urllib.request.Request(cluster.address + path, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def wait_until(is_so: Callable[[], bool], *, what: str, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Its own temporary folder, token and process group; all of it ends with the module."""
    home = tmp_path_factory.mktemp("home")
    folder = Path(tempfile.mkdtemp(prefix="rj", dir="/tmp"))  # short: the paths of sockets are limited
    gcs, dashboard, client, agent, agent_grpc, runtime_env = free_ports(6)
    environment = bare_environment(home) | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # else the end of the cluster takes 30 s
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}",
        "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}", f"--runtime-env-agent-port={runtime_env}",
        "--num-cpus=2", f"--object-store-memory={256 << 20}", f"--temp-dir={folder}", "--disable-usage-stats",
    ]  # fmt: skip
    log = home / "ray-start.log"
    with log.open("wb") as output:
        head = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    address = f"http://127.0.0.1:{dashboard}"
    cluster = Cluster(address, environment | {"RAY_API_SERVER_ADDRESS": address}, log)
    try:
        # The dashboard answers before the node has joined, and then has nobody to hand a job to.
        wait_until(
            lambda: (
                head.poll() is not None or ("Ray runtime started" in log.read_text() and answers(cluster, "/api/jobs/"))
            ),
            what="the cluster",
        )
        assert head.poll() is None, log.read_text()
        yield cluster
    finally:
        head.terminate()  # ends its children, those in process groups of their own too
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):  # none is left
            os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config that extends another, beside shards of small images: 2 epochs of 4 steps."""
    folder = tmp_path_factory.mktemp("input")
    shards = tiny_shards(folder, num_train=32, num_test=8)
    write_config(folder / "base.yaml", tiny_config(shards, global_batch=8, cluster={"num_workers": 1}))
    path = folder / "run.yaml"
    path.write_text("extends: base.yaml\nsave_every_steps: 2\n")
    return path


def submit(*arguments: str | Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


# Stands in for `ray`: keeps what it was given, answers `ray job status` from a list.
FAKE_RAY = """#!{python}
import json, os, pathlib, sys, time
kept = pathlib.Path(__file__).parent
arguments = sys.argv[1:]
if arguments[:2] == ["job", "submit"]:
    option = dict(zip(arguments, arguments[1:]))
    folder = pathlib.Path(option["--working-dir"])
    (kept / "submitted.json").write_text(json.dumps({{
        "arguments": arguments,
        "runtime_env": json.loads(pathlib.Path(option["--runtime-env"]).read_text()),
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()),
        "config": (folder / "run.yaml").read_text(),
        "auth_mode": os.environ["RAY_AUTH_MODE"],
        "address": os.environ["RAY_API_SERVER_ADDRESS"],
    }}))
    if (kept / "submit-fails").exists():
        first, *rest = json.loads((kept / "submit-fails").read_text())
        (kept / "submit-fails").write_text(json.dumps(rest)) if rest else (kept / "submit-fails").unlink()
        sys.exit(first)
elif arguments[:2] == ["job", "status"]:
    first, *rest = json.loads((kept / "answers.json").read_text()) or [None]
    if first is None:
        sys.exit("no answer")
    (kept / "answers.json").write_text(json.dumps(rest))
    print(first.replace("ID", arguments[2]))
elif arguments[:2] == ["job", "logs"] and (kept / "logs-hang").exists():
    (kept / "logs.pid").write_text(str(os.getpid()))
    print("a line of the log", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def fake_bin(tmp_path: Path) -> Path:
    """A folder with a `ray` that succeeds and a `dist-mlpl` that resolves every config to `resolved: true`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ray").write_text(FAKE_RAY.format(python=sys.executable))
    (folder / "dist-mlpl").write_text("#!/bin/sh\necho resolved: true\n")
    (folder / "answers.json").write_text(json.dumps(["Job 'ID' succeeded"]))
    for name in ("ray", "dist-mlpl"):
        (folder / name).chmod(0o755)
    return folder


def commits(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((out / "commits").glob("*.json"))]


def test_the_same_command_again_goes_on_from_the_commit_and_ends_exact(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    staging = tmp_path / "staging"
    staging.mkdir()
    environment = cluster.environment | {"MLPL_PYTHON": sys.executable, "TMPDIR": str(staging)}

    first = submit(config, out, "--max-steps", "3", environment=environment)
    assert first.returncode == 0, first.stdout + first.stderr
    assert [path.name for path in (out / "attempts").iterdir()] == ["0001.json"]
    assert commits(out)[-1]["step"] == 3
    assert not list(staging.iterdir())
    assert re.search(r"ray job logs -f \S*run-\d{8}T\d{6}Z-[0-9a-f]{6}\n", first.stderr)

    second = submit(config, out, environment=environment)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "attempt 2 resumes at epoch 0, 24 samples in, step 3" in second.stdout
    written = commits(out)
    assert [c["attempt"] for c in written] == ["0001"] * 2 + ["0002"] * (len(written) - 2)
    assert [c["parent"] for c in written] == [None, *(c["step"] for c in written[:-1])]
    assert written[1]["step"] == 3
    assert (written[-1]["step"], written[-1]["epoch"]) == (8, 2)
    assert audit(str(out)).faults == []


def test_a_wrong_token_is_refused_and_the_message_names_it(cluster: Cluster, fake_bin: Path, tmp_path: Path) -> None:
    (fake_bin / "ray").unlink()
    (fake_bin / "ray").symlink_to(BIN / "ray")
    environment = cluster.environment | {"MLPL_BIN": str(fake_bin), "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    result = submit("run.yaml", tmp_path / "run", environment=environment)
    assert result.returncode == 1
    assert "Invalid authentication token" in result.stderr
    assert "did not take the job" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_stopped_job_commits_first_and_the_script_exits_130(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    environment = cluster.environment | {"MLPL_PYTHON": sys.executable}
    command = [str(SCRIPT), str(config), str(out), "--set", "num_epochs=100000"]
    with (tmp_path / "log").open("w+") as log:
        job = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until(lambda: job.poll() is not None or bool(list(out.glob("commits/*"))), what="a commit")
            log.seek(0)
            text = log.read()
            assert job.poll() is None, text
            stop = re.search(r"ray (job stop \S+)", text)
            assert stop is not None
            subprocess.run([BIN / "ray", *stop[1].split()], env=environment, capture_output=True, check=True)
            job.wait(timeout=120)
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
        log.seek(0)
        assert job.returncode == 130, log.read()
    rows = [json.loads(line) for path in (out / "metrics").iterdir() for line in path.read_text().splitlines()]
    assert rows[-1]["event"] == "stopped"
    assert commits(out)[-1]["step"] == rows[-1]["step"]
    assert audit(str(out)).faults == []


def test_the_job_is_given_this_code_the_resolved_config_and_the_named_variables_alone(
    fake_bin: Path, tmp_path: Path
) -> None:
    value = 'line one\nwith "quotes", \\backslash\\, & and $HOME'
    environment = bare_environment(tmp_path) | {
        "MLPL_BIN": str(fake_bin), "RAY_AUTH_TOKEN": "secret", "MLPL_FORWARD": "KEPT ALSO_KEPT", "KEPT": value,
        "ALSO_KEPT": "1", "NOT_KEPT": "2", "RAY_ADDRESS": "https://cluster:8265", "MLPL_PYTHON": "/opt/python",
    }  # fmt: skip
    result = submit("run.yaml", "s3://bucket/runs/a b", "--set", "method.name=x y", environment=environment)
    assert result.returncode == 0, result.stderr
    given = json.loads((fake_bin / "submitted.json").read_text())
    entry = given["arguments"][given["arguments"].index("--") + 1 :]
    assert entry == ["/opt/python", "-m", "dist_mlpl.cli", "train", "run.yaml", "--out", "s3://bucket/runs/a b",
                     "--address", "auto", "--set", "method.name=x y"]  # fmt: skip
    option = dict(zip(given["arguments"], given["arguments"][1:], strict=False))
    metadata = json.loads(option["--metadata-json"])
    assert metadata == {"job_name": "bucket-runs-a-b", "out": "s3://bucket/runs/a b"}
    assert option["--submission-id"].startswith("bucket-runs-a-b-")
    variables = given["runtime_env"]["env_vars"]
    assert variables == {"KEPT": value, "ALSO_KEPT": "1", "RAY_JOB_STOP_WAIT_TIME_S": "600"}
    assert {"run.yaml", "dist_mlpl/cli.py", "shards/build.py"} <= set(given["files"])
    assert not [name for name in given["files"] if "__pycache__" in name]
    assert given["config"] == "resolved: true\n"
    assert (given["auth_mode"], given["address"]) == ("token", "https://cluster:8265")
    assert "secret" not in json.dumps(given)


@pytest.mark.parametrize(
    ("answers", "status"),
    [
        (["Job 'ID' succeeded"], 0),
        (["Job 'ID' was stopped"], 130),
        (["Job 'ID' failed\nStatus message: Job entrypoint command failed with exit code 3, last logs:\n..."], 3),
        (["Job 'ID' failed\nStatus message: the node died"], 4),
        (["Status for job 'ID': RUNNING", "Job 'ID' failed\nfailed with exit code 2"], 2),
    ],
    ids=["succeeded", "stopped", "failed with a code", "failed without", "connection lost on the way"],
)
def test_the_script_exits_as_the_run_did(fake_bin: Path, tmp_path: Path, answers: list[str], status: int) -> None:
    (fake_bin / "answers.json").write_text(json.dumps(answers))
    environment = bare_environment(tmp_path) | {"MLPL_BIN": str(fake_bin), "RAY_AUTH_MODE": "disabled"}
    assert submit("run.yaml", "/shared/run", environment=environment).returncode == status
    assert json.loads((fake_bin / "answers.json").read_text()) == []


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("answers", "status", "says"),
    [
        (["Status for job 'ID': RUNNING", "Job 'ID' succeeded"], 0, "returned"),
        (["Status for job 'ID': RUNNING", "Job 'ID' failed\nfailed with exit code 3"], 3, "ended with 3"),
        ([], 1, "lost sight of the job"),
    ],
    ids=["succeeded", "failed", "the head is gone"],
)
def test_a_log_that_hangs_does_not_hide_the_end_of_the_job(
    fake_bin: Path, tmp_path: Path, answers: list[str], status: int, says: str
) -> None:
    (fake_bin / "answers.json").write_text(json.dumps(answers))
    (fake_bin / "logs-hang").touch()
    environment = bare_environment(tmp_path) | {
        "MLPL_BIN": str(fake_bin), "RAY_AUTH_MODE": "disabled", "MLPL_LOOK_SECONDS": "1",
    }  # fmt: skip
    result = submit("run.yaml", "/shared/run", environment=environment)
    assert result.returncode == status, result.stderr
    assert says in result.stderr
    assert "a line of the log" in result.stdout
    assert not is_alive(int((fake_bin / "logs.pid").read_text()))


def test_ctrl_c_ends_the_display_and_the_process_behind_it(fake_bin: Path, tmp_path: Path) -> None:
    (fake_bin / "answers.json").write_text(json.dumps(["Status for job 'ID': RUNNING"] * 50))
    (fake_bin / "logs-hang").touch()
    environment = bare_environment(tmp_path) | {"MLPL_BIN": str(fake_bin), "RAY_AUTH_MODE": "disabled"}
    job = subprocess.Popen(
        [str(SCRIPT), "run.yaml", "/shared/run"], env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run behind `&`
    )  # fmt: skip
    try:
        pid = fake_bin / "logs.pid"
        wait_until(lambda: pid.exists() and bool(pid.read_text()), what="the log")
        os.killpg(job.pid, signal.SIGINT)
        job.wait(timeout=20)
        wait_until(lambda: not is_alive(int(pid.read_text())), what="the end of the display", seconds=10)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)


@pytest.mark.parametrize(("answers", "status"), [(["Status for job 'ID': PENDING", "Job 'ID' succeeded"], 0), ([], 1)])
def test_a_submission_whose_answer_is_lost_is_followed_if_the_job_is_there(
    fake_bin: Path, tmp_path: Path, answers: list[str], status: int
) -> None:
    (fake_bin / "answers.json").write_text(json.dumps(answers))
    (fake_bin / "submit-fails").write_text(json.dumps(["the connection was reset"]))
    environment = bare_environment(tmp_path) | {"MLPL_BIN": str(fake_bin), "RAY_AUTH_MODE": "disabled"}
    result = submit("run.yaml", "/shared/run", environment=environment)
    assert result.returncode == status, result.stderr
    assert ("the job is there" if status == 0 else "did not take the job") in result.stderr


@pytest.mark.parametrize(("num_refused", "status"), [(2, 0), (13, 1)])
def test_a_cluster_without_a_node_yet_is_asked_again_for_a_while(
    fake_bin: Path, tmp_path: Path, num_refused: int, status: int
) -> None:
    (fake_bin / "answers.json").write_text(json.dumps(["Job 'ID' succeeded"] if status == 0 else []))
    (fake_bin / "submit-fails").write_text(json.dumps(["No available agent to submit job"] * num_refused))
    environment = bare_environment(tmp_path) | {
        "MLPL_BIN": str(fake_bin), "RAY_AUTH_MODE": "disabled", "MLPL_LOOK_SECONDS": "1",
    }  # fmt: skip
    result = submit("run.yaml", "/shared/run", environment=environment)
    assert result.returncode == status, result.stderr
    assert not (fake_bin / "submit-fails").exists()
    assert result.stderr.count("trying again") == 1
    assert ("No available agent" in result.stderr) == (status == 1)


@pytest.mark.parametrize(
    ("resolved", "arguments", "found"),
    [
        ("data:\n  manifest: runs/shards\n  view: null\n", [], "runs/shards"),
        ("data:\n  manifest:\n  - manifest: /shared/a\n    weight: 1.0\n  - manifest: b\n", [], "b"),
        ("data:\n  manifest: /shared/a\n", ["--set", "data.manifest=runs/shards"], "runs/shards"),
        ("data:\n  manifest: /shared/a\n", ["--set=data.manifest=runs/shards"], "runs/shards"),
        ("data:\n  manifest: /shared/a\nother:\n  manifest: b\n", [], None),
        ("data:\n  manifest: ''\n", [], None),
        ("data:\n  manifest: runs/shards\n", ["--set", "data.manifest=s3://bucket/shards"], None),
    ],
)
def test_shards_by_a_relative_path_are_refused_before_anything_is_submitted(
    fake_bin: Path, tmp_path: Path, resolved: str, arguments: list[str], found: str | None
) -> None:
    (fake_bin / "resolved.yaml").write_text(resolved)
    (fake_bin / "dist-mlpl").write_text(f"#!/bin/sh\ncat {fake_bin}/resolved.yaml\n")
    environment = bare_environment(tmp_path) | {"MLPL_BIN": str(fake_bin), "RAY_AUTH_MODE": "disabled"}
    result = submit("run.yaml", "/shared/run", *arguments, environment=environment)
    assert result.returncode == (0 if found is None else 2), result.stderr
    assert (fake_bin / "submitted.json").exists() == (found is None)
    if found is not None:
        assert f"data.manifest is '{found}'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "changed", "message"),
    [
        ([], {}, "usage:"),
        (["run.yaml"], {}, "usage:"),
        (["run.yaml", "runs/relative"], {}, "OUT is 'runs/relative'"),
        (["run.yaml", "/shared/run", "--out", "/other"], {}, "--out among the extra arguments"),
        (["run.yaml", "/shared/run"], {"RAY_AUTH_TOKEN": ""}, "no token"),
        (["run.yaml", "/shared/run"], {"RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": "/missing"}, "RAY_AUTH_TOKEN_PATH"),
        (["run.yaml", "/shared/run"], {"RAY_AUTH_MODE": "maybe"}, "RAY_AUTH_MODE is 'maybe'"),
        (["run.yaml", "/shared/run"], {"RAY_ADDRESS": "10.0.0.1:6379"}, "the cluster's address is '10.0.0.1:6379'"),
        (["run.yaml", "/shared/run"], {"MLPL_FORWARD": "UNSET_NAME"}, "UNSET_NAME, which is not set"),
        (["run.yaml", "/shared/run"], {"MLPL_BIN": "/missing"}, "no ray in MLPL_BIN"),
        (["run.yaml", "/shared/run"], {"MLPL_LOOK_SECONDS": "0"}, "MLPL_LOOK_SECONDS is '0'"),
    ],
)
def test_wrong_usage_exits_2_before_anything_is_submitted(
    fake_bin: Path, tmp_path: Path, arguments: list[str], changed: dict[str, str], message: str
) -> None:
    environment = bare_environment(tmp_path) | {"MLPL_BIN": str(fake_bin), "RAY_AUTH_TOKEN": "secret"}
    result = submit(*arguments, environment=environment | changed)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (fake_bin / "submitted.json").exists()
