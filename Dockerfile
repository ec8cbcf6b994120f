# Everything on a CPU, ready to use:
#     docker build -t ddk .
#     docker run --rm --shm-size=1g ddk            runs `make demo`
FROM debian:bookworm-slim

# What tools/check_setup.py asks for, and bubblewrap, in which `ddk evaluate` runs programs that a model wrote.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
    bubblewrap ca-certificates g++ git make python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/ddk_ds
COPY . .
# The check before the set-up wants the shared memory that runs need; a build has 64 MB.
RUN --mount=type=tmpfs,target=/dev/shm UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1 make setup
ENV PATH=/opt/ddk_ds/.venv/bin:$PATH
CMD ["make", "demo"]
