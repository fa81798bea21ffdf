# One machine, one model, no GPU:
#   docker build -t stillhouse .
#   docker run --rm -p 127.0.0.1:8000:8000 -v models:/models -e STILLHOUSE_API_KEY=choose-one stillhouse
#   docker run … stillhouse serve deepseek-r1:1.5b --host 0.0.0.0     (the last four words are the command)
# CI does not build this image. It compiles for CPUs with AVX2 (x86-64 since 2013) or any 64-bit ARM, not for the
# machine that builds it: faster here would mean broken there.
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends build-essential && rm -rf /var/lib/apt/lists/*
WORKDIR /src
# Dependencies first: a change of our code does not compile llama.cpp again.
COPY pyproject.toml ./
ENV CMAKE_ARGS="-DGGML_NATIVE=OFF"
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*p['dependencies'], *p['optional-dependencies']['demo'], sep='\n')" > requirements.txt \
 && python -m venv /opt/stillhouse \
 && /opt/stillhouse/bin/pip install --no-cache-dir -r requirements.txt
COPY . .
RUN /opt/stillhouse/bin/pip install --no-cache-dir --no-deps .

FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin stillhouse \
 && install -d -o stillhouse /models
COPY --from=build /opt/stillhouse /opt/stillhouse
ENV PATH=/opt/stillhouse/bin:$PATH HF_HOME=/models PYTHONUNBUFFERED=1
USER 10001
VOLUME /models
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=3s --start-period=5m \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["stillhouse"]
CMD ["serve", "--host", "0.0.0.0"]
