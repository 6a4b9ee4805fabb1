# vLLM's own image, so that the engine and its CUDA libraries are the ones vLLM tests together.
# For a byte-exact base, build with --build-arg BASE=vllm/vllm-openai@sha256:<digest of v0.23.0 in your registry>.
ARG BASE=vllm/vllm-openai:v0.23.0
FROM ${BASE}

LABEL org.opencontainers.image.title="ard-serve" \
      org.opencontainers.image.licenses="Apache-2.0"

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY ard_serve ard_serve
COPY restore restore
COPY server server
COPY loadtests loadtests
# The base image has every library that `ard serve` needs; the import is the proof. Nothing else is installed, so that no
# version that vLLM was tested with changes.
RUN PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir --no-deps . \
    && rm -rf /src/* \
    && python3 -P -c "import server.app" \
    && useradd --uid 10001 --user-group --create-home ard

# Asking vLLM for its flags takes as long as importing it: once here, not at each start. Where a build has no GPU for that, then.
ENV ARD_SERVE_CACHE=/opt/ard-serve
RUN XDG_CACHE_HOME=/opt python3 -P -c "from server.config import ServeConfig; from server.flags import known_flags; \
    known_flags(ServeConfig.model_fields['engine_command'].default)" \
    || echo "vLLM's flags are asked at the first start instead"

# Nothing is downloaded at start, and nothing is reported to anybody.
ENV HF_HUB_OFFLINE=1 \
    TRANSFORMERS_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1 \
    DO_NOT_TRACK=1 \
    PYTHONUNBUFFERED=1

USER 10001:10001
WORKDIR /home/ard
EXPOSE 8000
# Loading takes minutes; until the start period is over a failing probe does not count.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
# Exec form: `ard` is process 1 and gets the SIGTERM that starts its drain. Stop with a grace period above --drain-s.
ENTRYPOINT ["ard", "serve"]
CMD ["/model", "--host", "0.0.0.0", "--api-keys", "/run/secrets/api-keys.toml"]
