# The server, for CPUs. Build: docker build -t foreroute .
# Run the model that ships: docker run --rm -p 8000:8000 -e FOREROUTE_API_KEY=secret foreroute
# Another one: docker run ... -v /path/to/model:/model:ro foreroute serve /model --host 0.0.0.0
# Memory and threads follow the container's limits (docker run --memory 8g --cpus 4).
FROM python:3.12-slim AS build
WORKDIR /source
COPY . .
# The index of PyTorch's builds for CPUs, as pytorch.org says it (--build-arg TORCH_INDEX=...): what comes without it has
# CUDA's libraries and is four times as large.
ARG TORCH_INDEX=
RUN python -m venv /venv \
 && /venv/bin/pip install --no-cache-dir torch ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
 && /venv/bin/pip install --no-cache-dir '.[serve]'

FROM python:3.12-slim
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH HF_HOME=/cache PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 foreroute && mkdir /cache && chown foreroute /cache
USER foreroute
VOLUME /cache
EXPOSE 8000
# Ready when the model is loaded; a large one takes minutes.
HEALTHCHECK --start-period=10m --interval=30s --timeout=5s \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# Outside of the container it listens only with a key (FOREROUTE_API_KEY) or with --insecure.
ENTRYPOINT ["foreroute"]
CMD ["serve", "foreroute-tiny", "--host", "0.0.0.0"]
