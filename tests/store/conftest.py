"""A bucket for the tests of stores: real requests to a server on the loopback."""

from collections.abc import Iterator
from threading import Thread

import boto3
import pytest
from werkzeug.serving import make_server

from tests.store.moto_server import Server


@pytest.fixture(scope="package")
def server() -> Iterator[Server]:
    server = Server()
    listener = make_server("127.0.0.1", 0, server, threaded=True)
    server.url = f"http://127.0.0.1:{listener.server_port}"
    thread = Thread(target=listener.serve_forever)
    thread.start()
    yield server
    listener.shutdown()
    thread.join()


@pytest.fixture
def client(server, monkeypatch):
    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "canary-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda self, context: 0.0)
    client = boto3.client("s3")
    client.create_bucket(Bucket="models")
    yield client
    server.plan = lambda method, path: None
    keys = [entry["Key"] for entry in client.list_objects_v2(Bucket="models").get("Contents", [])]
    for key in keys:
        client.delete_object(Bucket="models", Key=key)
    client.delete_bucket(Bucket="models")
