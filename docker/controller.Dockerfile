# syntax=docker/dockerfile:1
# Driver and Ray head: the loop, Ray and its dashboard. No torch, vllm or deepspeed; those are in the worker's image.
# Build context: the root of the repository.

# Any Debian or Ubuntu with Python 3.11 and its venv module.
ARG BASE=python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d

# grpo alone, laid out as it will lie in the final image.
FROM ${BASE} AS product
COPY requirements/uv.lock /tools/
RUN python3 -m venv /tools/venv && \
    /tools/venv/bin/python -m pip install --no-cache-dir --require-hashes -r /tools/uv.lock
COPY pyproject.toml README.md LICENSE /src/
COPY grpo /src/grpo
RUN /tools/venv/bin/uv build -q --wheel --no-build-isolation --python /tools/venv/bin/python -o /dist /src && \
    python3 -m venv --without-pip /opt/grpo && \
    /tools/venv/bin/uv pip install --no-deps --compile-bytecode --python /opt/grpo/bin/python /dist/*.whl && \
    find /opt/grpo -type l -delete && rm -r /opt/grpo/pyvenv.cfg /opt/grpo/include /opt/grpo/bin/[aA]ctivate*
COPY examples /opt/grpo/examples
RUN chmod -R a+rX,go-w /opt/grpo

FROM ${BASE} AS controller
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Whatever uid 10001 may do, any other user of group 0 may too; USER names users that /etc/passwd does not know.
RUN useradd --uid 10001 --gid 0 --no-create-home --home-dir /home/grpo --shell /bin/bash grpo && \
    install -d -o 10001 -g 0 -m 2775 /home/grpo
ENV PATH=/opt/grpo/bin:${PATH} HOME=/home/grpo USER=grpo LANG=C.UTF-8 PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0

COPY docker/install.sh requirements/uv.lock requirements/controller.lock /opt/grpo/requirements/
RUN /opt/grpo/requirements/install.sh /opt/grpo/requirements/controller.lock
USER 10001:0
WORKDIR /home/grpo
RUN ray --version && \
    python -c "import datasets, prometheus_client, ray.dashboard.agent, ray.job_submission, tensorboard, transformers" && \
    rm -rf /tmp/*

COPY --from=product /opt/grpo /opt/grpo
RUN grpo --version
CMD ["grpo", "--help"]

ARG VERSION
ARG REVISION
ARG CREATED
ARG SOURCE=""
ARG BASE
LABEL org.opencontainers.image.title="grpo-controller" \
      org.opencontainers.image.description="GRPO fine-tuning: the driver and the Ray head" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.base.name="${BASE}"
