# syntax=docker/dockerfile:1
# Two images: `online` holds the BSE service and the scorer, without torch, Ray or MLflow; `mlflow`
# holds MLflow's server. docker-compose.yml builds and runs both.

FROM python:3.11-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY hashtab hashtab
COPY features features
COPY kernels kernels
COPY models models
COPY pipelines pipelines
COPY serving serving
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
# 25.1 is the first pip that installs dependency groups.
RUN pip install --upgrade "pip>=25.1" \
    && useradd --create-home --uid 10001 hashtab \
    && install --directory --owner=hashtab /data
COPY pyproject.toml /tmp/pyproject.toml
WORKDIR /home/hashtab

FROM base AS mlflow
RUN pip install --group /tmp/pyproject.toml:registry
ENV MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
USER hashtab
EXPOSE 5000
CMD ["mlflow", "server", "--help"]

FROM base AS online
RUN pip install --group /tmp/pyproject.toml:online
COPY --from=wheel /wheels /tmp/wheels
# What the online path needs is installed already; the rest of hashtab's dependencies stays out.
RUN pip install --no-deps /tmp/wheels/*.whl
USER hashtab
EXPOSE 8000 8001
ENV HASHTAB_PORT=8000
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s CMD ["python", "-c", \
    "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"HASHTAB_PORT\"]}/health/ready', timeout=2)"]
CMD ["python", "-m", "hashtab.serving.scorer", "--help"]
