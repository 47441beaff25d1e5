# syntax=docker/dockerfile:1
# An image of wsi-pipe and lrmil, for processors (the default) or for NVIDIA's cards:
#   docker build -t wsi-pipe .
#   docker build -t wsi-pipe:cuda --target cuda .
#   docker run --rm -u "$(id -u):$(id -g)" -v /archive:/slides:ro -v "$PWD:/data" wsi-pipe wsi-pipe run /slides -o job
# There is no entry point: workflow engines and Kubernetes give commands of their own.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build
# A compiler for the parts in C, which stays behind here. Debian's own versions are as good as pinned ones.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 WSI_PIPE_COMPILED=required
RUN python -m venv /opt/wsi-pipe
ENV PATH=/opt/wsi-pipe/bin:$PATH
WORKDIR /src
COPY . .

FROM build AS build-cpu
# torch without CUDA is in an index of its own. What only developers of torch need goes: headers and static libraries.
# hadolint ignore=DL3013
RUN pip install --no-compile ".[cluster,s3]" --extra-index-url https://download.pytorch.org/whl/cpu \
    && rm -rf /opt/wsi-pipe/lib/python3*/site-packages/torch/include \
    && find /opt/wsi-pipe -name "*.a" -delete

FROM build AS build-cuda
# hadolint ignore=DL3013
RUN pip install --no-compile ".[cluster,s3,gpu]" \
    && rm -rf /opt/wsi-pipe/lib/python3*/site-packages/torch/include \
    && find /opt/wsi-pipe -name "*.a" -delete

FROM python:${PYTHON}-slim-bookworm AS runtime
# ps, which Nextflow measures tasks with.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends procps && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 wsi && install -d -o wsi -g wsi /data
# Caches where any user may write, since clusters choose the user; weights of encoders go below HF_HOME, so mount that.
ENV PATH=/opt/wsi-pipe/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/data/huggingface XDG_CACHE_HOME=/tmp/cache MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /data
USER 1000
CMD ["wsi-pipe", "--help"]

FROM runtime AS cuda
# The driver comes from the host, by NVIDIA's container toolkit: docker run --gpus all.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/wsi-pipe /opt/wsi-pipe

FROM runtime AS cpu
COPY --from=build-cpu /opt/wsi-pipe /opt/wsi-pipe
