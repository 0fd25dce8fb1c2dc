# Two images: docker build --target cpu -t light-tts:cpu .    docker build --target cuda -t light-tts:cuda .
# See docs/containers.md for how to run them.

FROM debian:bookworm-slim AS base
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home light-tts \
    && install -d -o light-tts /models /voices /home/light-tts/.triton
ENV PATH=/opt/light-tts/bin:$PATH PYTHONUNBUFFERED=1

FROM base AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/light-tts
WORKDIR /src
COPY constraints.txt pyproject.toml setup.py MANIFEST.in README.md ./
COPY config ./config
COPY pretrained_models ./pretrained_models
COPY light_tts ./light_tts

FROM build AS build-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" -c constraints.txt .

FROM build AS build-cuda
RUN pip install --no-cache-dir -c constraints.txt ".[gpu]"

FROM base AS served
WORKDIR /home/light-tts
EXPOSE 8080
VOLUME ["/models", "/voices"]
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=5m CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/readiness', timeout=4)"]
# Flags after the image name are appended here and take precedence.
ENTRYPOINT ["tini", "--", "light-tts", "serve", "--host", "0.0.0.0", "--spk_dir", "/voices", "--log_dir", ""]

FROM served AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Triton compiles the launchers of its kernels with the C compiler of the target machine.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build-cuda /opt/light-tts /opt/light-tts
VOLUME ["/home/light-tts/.triton"]
USER 10001

FROM served AS cpu
COPY --from=build-cpu /opt/light-tts /opt/light-tts
USER 10001
