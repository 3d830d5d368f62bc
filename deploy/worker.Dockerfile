# The worker. On Linux pip's torch is the CUDA build; for a CPU-only image pass the index of PyTorch's CPU wheels:
#   docker compose build --build-arg PIP_EXTRA_INDEX_URL=... worker-cpu
FROM python:3.12-slim

# A C compiler: Triton builds its launchers with it, the CPU attention kernel is compiled for the machine it runs on.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ARG PIP_EXTRA_INDEX_URL=""
WORKDIR /opt/promptmill
# First what it needs, for packages that are empty yet: a change of ours fetches none of it again.
COPY pyproject.toml constraints.txt ./
RUN mkdir engine producer worker && touch README.md \
    && pip install --no-cache-dir -c constraints.txt ".[worker]"
COPY README.md LICENSE ./
COPY engine engine
COPY producer producer
COPY worker worker
RUN pip install --no-cache-dir --no-deps --force-reinstall .

RUN useradd --system --uid 10001 --home-dir /var/cache/promptmill --create-home promptmill
USER 10001
ENV HOME=/var/cache/promptmill \
    XDG_CACHE_HOME=/var/cache/promptmill \
    HF_HOME=/var/cache/promptmill/huggingface \
    PYTHONUNBUFFERED=1
VOLUME /var/cache/promptmill

STOPSIGNAL SIGTERM
CMD ["promptmill", "worker"]
