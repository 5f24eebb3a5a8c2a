# syntax=docker/dockerfile:1
# CUDA by default: torch's own wheel brings the CUDA libraries, the host brings the driver.
#
#   docker build -t tympan .
#   docker build -t tympan:cpu --build-arg TORCH_INDEX=<URL of a CPU wheel index of torch> .
#   docker build -t tympan --build-arg FLASH_ATTN=<URL of a wheel of flash-attn for that torch> .
#   docker run --gpus all -p 8000:8000 -v ~/.cache/huggingface:/cache tympan --model Qwen/Qwen2-Audio-7B-Instruct

FROM python:3.12-slim AS build
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /app
# Layers in order of how seldom they change: torch, the other dependencies, our own code. All files have the hashes of
# requirements/, but those from another index of torch.
COPY requirements/torch.txt requirements/
RUN if [ -z "$TORCH_INDEX" ]; then pip install --require-hashes --no-deps --requirement requirements/torch.txt; \
    else pip install --index-url "$TORCH_INDEX" "$(grep -om1 '^torch==[0-9.]*' requirements/torch.txt)"; fi
COPY requirements/runtime.txt requirements/
RUN pip install --require-hashes --no-deps --requirement requirements/runtime.txt
# Optional: own kernels serve without it. As sources it would need nvcc, which this image does not bring, and hours.
ARG FLASH_ATTN=""
RUN if [ -n "$FLASH_ATTN" ]; then pip install --no-deps einops "$FLASH_ATTN"; fi
COPY pyproject.toml README.md LICENSE NOTICE THIRD_PARTY.md ./
COPY server server
COPY engine engine
COPY model model
COPY audio audio
COPY configs configs
COPY tympan tympan
RUN pip install --no-deps --no-build-isolation --editable . && pip check
COPY checkpoints/tympan-tiny checkpoints/tympan-tiny

FROM python:3.12-slim
RUN useradd --uid 2000 --gid 0 --create-home tympan && mkdir /cache && chown 2000:0 /cache && chmod g+w /cache
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
WORKDIR /app
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HOME=/cache TYMPAN_HOST=0.0.0.0
USER 2000
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=600s --interval=10s --timeout=3s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
ENTRYPOINT ["tympan", "serve"]
