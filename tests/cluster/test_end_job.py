"""A job of Ray's that tells Ray that it was stopped, and why."""

import asyncio
import json

import pytest
import ray
from ray.dashboard.modules.job.common import JobInfo, JobInfoStorageClient, JobStatus

from grpo.cluster.ray_private import end_job
from grpo.cluster.session import Session
from grpo.errors import ClusterError


@pytest.mark.slow
def test_ray_knows_the_job_as_stopped_with_our_words_and_takes_no_other_end(
    cluster: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = ray._private.worker.global_worker.gcs_client  # type: ignore[attr-defined]
    jobs = JobInfoStorageClient(client)
    asyncio.run(jobs.put_info("job-1", JobInfo(status=JobStatus.RUNNING, entrypoint="grpo job")))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "job-1"}}))
    monkeypatch.setenv("RAY_ADDRESS", client.address)
    end_job("exit code 2: …")
    info = asyncio.run(jobs.get_info("job-1"))
    assert info is not None and (info.status, info.message) == (JobStatus.STOPPED, "exit code 2: …")
    with pytest.raises(RuntimeError, match="terminal state"):  # what Ray's supervisor tries when the process has ended
        asyncio.run(jobs.put_status("job-1", JobStatus.FAILED, message="exit code 2"))


def test_outside_of_a_job_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    with pytest.raises(ClusterError, match="must run as a job of Ray's"):
        end_job("exit code 2")
