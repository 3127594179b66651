# The benchmark in a container.
#
#   docker build -t resnet-jax .                          for NVIDIA GPUs, V100 and later
#   docker build -t resnet-jax-cpu --build-arg LOCK=cpu . for a laptop
#   docker run --gpus all -v DATA:/benchmark/data -v RUNS:/benchmark/runs resnet-jax scripts/run_and_time.sh [CONFIG] [FLAG...]
#
# DATA and RUNS are volumes, or folders that user 1000 may write to. A real run on more than one GPU wants
# --ipc=host as well (NCCL's shared memory).
#
# The base is Python's own image: NVIDIA's JAX images have left Volta out since 2025-02 and are CUDA 13
# since 2025-08. CUDA, cuDNN and NCCL come as wheels at the versions of requirements.txt, next to JAX, which
# finds them by itself (so no LD_LIBRARY_PATH); of the host only the driver is used.
FROM python:3.11.15-slim-bookworm

RUN useradd --create-home --uid 1000 mlperf
WORKDIR /benchmark

# LOCK=cpu: without the CUDA wheels. It stays set, so that scripts/setup_env.sh finds what it made here.
ARG LOCK=gpu
ENV LOCK=$LOCK
COPY requirements*.txt ./
COPY scripts/lib.sh scripts/setup_env.sh scripts/
RUN PIP_NO_CACHE_DIR=1 scripts/setup_env.sh && rm .venv.lock

COPY . .
# What runs record as their code, for the image holds no repository:
# --build-arg COMMIT="$(git describe --always --dirty --abbrev=40)"
ARG COMMIT=unknown
ENV COMMIT=$COMMIT
RUN mkdir data runs && chown mlperf:mlperf data runs
VOLUME ["/benchmark/data", "/benchmark/runs"]

# What NVIDIA's container runtime lends: every GPU, and nvidia-smi to see them.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1
USER 1000
CMD ["scripts/run_and_time.sh"]
