# syntax=docker/dockerfile:1
# Rollout and trainer pods: vLLM samples, DeepSpeed trains. Targets: cpu and gpu.
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

FROM ${BASE} AS runtime
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Whatever uid 10001 may do, any other user of group 0 may too; USER names users that /etc/passwd does not know.
RUN useradd --uid 10001 --gid 0 --no-create-home --home-dir /home/grpo --shell /bin/bash grpo && \
    install -d -o 10001 -g 0 -m 2775 /home/grpo
ENV PATH=/opt/grpo/bin:${PATH} HOME=/home/grpo USER=grpo LANG=C.UTF-8 PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0

FROM runtime AS cpu
# libnuma is what vLLM's CPU build links to.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libnuma1 && rm -rf /var/lib/apt/lists/*
# What only a GPU loads goes, as far as torch does not link to it and no `import` asks for it.
COPY docker/install.sh requirements/uv.lock requirements/worker-cpu.lock /opt/grpo/requirements/
RUN /opt/grpo/requirements/install.sh /opt/grpo/requirements/worker-cpu.lock && \
    rm -r /opt/grpo/lib/python3*/site-packages/triton/backends/nvidia/bin \
        /opt/grpo/lib/python3*/site-packages/nvidia/cudnn/lib/libcudnn_*
USER 10001:0
WORKDIR /home/grpo
RUN ray --version && \
    python -c "import ray.dashboard.agent, deepspeed, torch, transformers, triton, vllm; print(vllm.__version__)" && \
    rm -rf /tmp/*

COPY --from=product /opt/grpo /opt/grpo
RUN grpo --version
CMD ["grpo", "--help"]

ARG VERSION
ARG REVISION
ARG CREATED
ARG SOURCE=""
ARG BASE
LABEL org.opencontainers.image.title="grpo-worker" \
      org.opencontainers.image.description="GRPO fine-tuning: vLLM and DeepSpeed for CPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.base.name="${BASE}"

FROM runtime AS gpu
# FlashInfer's sampler is compiled by nvcc when it is first used: a slow start at best, so vLLM takes its own.
ENV VLLM_USE_FLASHINFER_SAMPLER=0
# Triton compiles a small C file per kernel, with Python's headers.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev libnuma1 && \
    if [ ! -e "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]; then \
        apt-get install -y --no-install-recommends python3-dev; fi && \
    rm -rf /var/lib/apt/lists/*
# torch, Triton and CUDA's libraries have a layer of their own, which a node pulls beside the rest.
COPY docker/install.sh requirements/uv.lock requirements/worker-gpu.lock /opt/grpo/requirements/
RUN /opt/grpo/requirements/install.sh /opt/grpo/requirements/worker-gpu.lock '^(nvidia-|torch==|triton==)'
# hadolint ignore=DL3059
RUN /opt/grpo/requirements/install.sh /opt/grpo/requirements/worker-gpu.lock
USER 10001:0
WORKDIR /home/grpo
RUN ray --version && \
    python -c "import ray.dashboard.agent, deepspeed, torch, transformers, triton, vllm; print(vllm.__version__)" && \
    rm -rf /tmp/*

COPY --from=product /opt/grpo /opt/grpo
RUN grpo --version
CMD ["grpo", "--help"]

ARG VERSION
ARG REVISION
ARG CREATED
ARG SOURCE=""
ARG BASE
LABEL org.opencontainers.image.title="grpo-worker" \
      org.opencontainers.image.description="GRPO fine-tuning: vLLM and DeepSpeed for CUDA GPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.base.name="${BASE}"
