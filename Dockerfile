# syntax=docker/dockerfile:1
# One image for every CPU of its architecture:
#   docker build -t stillhouse .
#   docker run --rm --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
#     -p 127.0.0.1:8000:8000 -v models:/models -e STILLHOUSE_API_KEY=choose-one stillhouse serve deepseek-r1:1.5b
# With an NVIDIA GPU (compiles for half an hour and more; run it with --gpus all):
#   docker build -t stillhouse:cuda --build-arg BASE=docker.io/nvidia/cuda:12.8.1-runtime-ubuntu24.04 \
#     --build-arg BUILD_BASE=docker.io/nvidia/cuda:12.8.1-devel-ubuntu24.04 --build-arg GPU=-DGGML_CUDA=ON .
# Both bases are Debian or Ubuntu, of the same release: what the first compiles runs on the second.
ARG BASE=docker.io/library/debian:trixie-slim
ARG BUILD_BASE=${BASE}

FROM ${BUILD_BASE} AS build
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends build-essential ca-certificates python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
# Dependencies first: a change of our code does not compile llama.cpp again.
COPY pyproject.toml ./
# A library for each kind of CPU, beside each other; the best one is loaded where the container runs.
ARG GPU=
# Where wheels lie that need not be compiled again; a folder is mounted with -v.
ARG PIP_FIND_LINKS
ENV CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON -DGGML_CPU_ALL_VARIANTS=ON \
-DCMAKE_INSTALL_BINDIR=llama_cpp/lib -DLLAVA_BUILD=OFF ${GPU}"
RUN python3 -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*p['dependencies'], *p['optional-dependencies']['demo'], sep='\n')" > requirements.txt \
 && python3 -m venv /opt/stillhouse \
 && /opt/stillhouse/bin/pip install --no-cache-dir -r requirements.txt
COPY . .
RUN /opt/stillhouse/bin/pip install --no-cache-dir --no-deps .

FROM ${BASE}
LABEL org.opencontainers.image.title="Stillhouse" \
      org.opencontainers.image.description="Serves R1-distilled reasoning models to OpenAI clients" \
      org.opencontainers.image.licenses="MIT"
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates libgomp1 python3 \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 stillhouse \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin stillhouse \
 && install -d -o 10001 -g 10001 /models
COPY --from=build /opt/stillhouse /opt/stillhouse
# Only /models and /tmp are written to.
ENV PATH=/opt/stillhouse/bin:$PATH HOME=/tmp HF_HOME=/models PYTHONUNBUFFERED=1 STILLHOUSE_HOST=0.0.0.0
USER 10001:10001
VOLUME /models
EXPOSE 8000
STOPSIGNAL SIGTERM
# Downloads and loading are not over after a few seconds; what is not ready by then is only called so.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30m --retries=3 \
  CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/ready', timeout=2)"]
ENTRYPOINT ["stillhouse"]
CMD ["serve"]
