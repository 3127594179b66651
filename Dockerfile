# SPDX-License-Identifier: Apache-2.0
#
# The benchmark in a container.
#
#   docker build -t training-jax .                          for NVIDIA GPUs, V100 and later
#   docker build -t training-jax-cpu --build-arg LOCK=cpu . for a machine without one
#   docker build -t training-jax-cuda13 --build-arg LOCK=cuda13 --build-arg BASE=BASE13 .
#       for NVIDIA GPUs, Ampere and later, with a newer JAX and CUDA 13; BASE13 is
#       python:3.12.12-slim-bookworm@sha256:593bd06efe90efa80dc4eee3948be7c0fde4134606dd40d8dd8dbcade98e669c
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v DATA:/benchmark/data -v RUNS:/benchmark/runs \
#       training-jax scripts/run_and_time.sh [CONFIG] [FLAG...]
#
# DATA and RUNS are volumes, or absolute paths of folders that user 1000 may write to
# (chown 1000 DATA RUNS). --ipc=host and --ulimit memlock=-1 are for NCCL: shared and pinned memory, needed
# with more than one GPU. User 1000 cannot drop the page cache of the host, so a log written here says
# cache_clear: false. A submission drops it on the host before the run, or runs with --user=0 --privileged.
#
# The image runs the benchmark. Tests and submission packages need the git repository: run
# scripts/run_tests.sh and scripts/package_submission.py in a clone.
#
# The base is Python's own image: NVIDIA's JAX images have left Volta out since 2025-02 and are CUDA 13
# since 2025-08. The digest names one image for every platform; the tag beside it is for readers. CUDA, cuDNN
# and NCCL are wheels at the versions of requirements.txt, next to JAX, which finds them by itself (so no
# LD_LIBRARY_PATH is needed); only the driver comes from the host.
ARG BASE=python:3.11.15-slim-bookworm@sha256:d29f48a31a8b408ed19272ca1e7b10ebae13b240a27e862d3d4217c528e2e0c3
FROM $BASE

LABEL org.opencontainers.image.title="MLPerf Training reference implementations in JAX" \
      org.opencontainers.image.licenses="Apache-2.0"

RUN useradd --create-home --uid 1000 mlperf
WORKDIR /benchmark

# LOCK=cpu: without the CUDA wheels. LOCK=cuda13: with those of CUDA 13. It stays set, so that
# scripts/setup_env.sh recognises this environment.
ARG LOCK=gpu
ENV LOCK=$LOCK
COPY requirements*.txt ./
COPY scripts/lib.sh scripts/setup_env.sh scripts/
RUN PIP_NO_CACHE_DIR=1 scripts/setup_env.sh && rm .venv.lock

COPY . .
# The version of the code, which runs record; the image holds no repository:
# --build-arg COMMIT="$(git describe --always --dirty --abbrev=40)"
ARG COMMIT=unknown
ENV COMMIT=$COMMIT
LABEL org.opencontainers.image.revision=$COMMIT
RUN mkdir data runs && chown mlperf:mlperf data runs
VOLUME ["/benchmark/data", "/benchmark/runs"]

# What NVIDIA's container runtime provides: every GPU, and nvidia-smi to list them.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1
USER 1000
CMD ["scripts/run_and_time.sh"]
