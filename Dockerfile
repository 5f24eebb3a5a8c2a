# syntax=docker/dockerfile:1
# CUDA by default: torch's own wheel brings the CUDA libraries, the host brings the driver.
#
#   docker build -t tympan .
#   docker build -t tympan:cpu --build-arg TORCH_INDEX=<URL of a CPU wheel index of torch> .
#   docker build -t tympan --build-arg FLASH_ATTN=<URL of a wheel of flash-attn for that torch> .
#   docker run --gpus all -p 8000:8000 -v ~/.cache/huggingface:/cache tympan --model Qwen/Qwen2-Audio-7B-Instruct

FROM python:3.12-slim AS build
ARG TORCH="torch==2.13.0"
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# Layers in order of how seldom they change: torch, the other dependencies, our own code.
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"
WORKDIR /app
COPY pyproject.toml README.md ./
RUN python -c "import tomllib; print('\n'.join(tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']))" \
        > /tmp/requirements.txt \
    && pip install -r /tmp/requirements.txt
# Optional: own kernels serve without it. As sources it would need nvcc, which this image does not bring, and hours.
ARG FLASH_ATTN=""
RUN if [ -n "$FLASH_ATTN" ]; then pip install --no-deps einops "$FLASH_ATTN"; fi

FROM python:3.12-slim
RUN useradd --uid 2000 --gid 0 --create-home tympan && mkdir /cache && chown 2000:0 /cache && chmod g+w /cache
COPY --from=build /opt/venv /opt/venv
WORKDIR /app
COPY server server
COPY engine engine
COPY model model
COPY audio audio
COPY configs configs
COPY tympan tympan
COPY checkpoints/tympan-tiny checkpoints/tympan-tiny
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HOME=/cache TYMPAN_HOST=0.0.0.0
USER tympan
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=600s --interval=10s --timeout=3s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
ENTRYPOINT ["python", "-m", "server"]
