# qmix in a container, for the CPU and for NVIDIA cards.
#
#   docker build -t qmix .                                    # torch as PyPI has it, with CUDA
#   docker build -t qmix --build-arg PIP_ARGS="--index-url <the CPU index that pytorch.org's install page names>" .
#   docker run -it --rm -v ~/models:/models qmix chat /models/mixtral-int4 --ram 16G
#   docker run -it --rm --gpus all -v ~/models:/models qmix chat /models/mixtral-int4
#
# A mounted volume may be the output too: qmix quantize /models/SRC /models/OUT

FROM python:3.12-slim AS build
ARG PIP_ARGS=
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/qmix
COPY . /src
RUN cd /src && /opt/qmix/bin/pip install --no-cache-dir -c constraints.txt $PIP_ARGS torch \
 && /opt/qmix/bin/pip install --no-cache-dir -c constraints.txt .

# gcc stays: Triton compiles a launcher for each of the GPU's kernels with it.
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home qmix
COPY --from=build /opt/qmix /opt/qmix
ENV PATH=/opt/qmix/bin:$PATH
USER qmix
WORKDIR /home/qmix
ENTRYPOINT ["qmix"]
CMD ["--help"]
