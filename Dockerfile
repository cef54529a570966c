# One image for the app, its workers and builds, and the launcher. CPU by default; for CUDA:
#   docker build --build-arg TORCH='torch==2.13.0+cu130 --index-url https://download.pytorch.org/whl/cu130' \
#                --build-arg ONNXRUNTIME=onnxruntime-gpu==1.31.1 .
# Wheels in the folder wheels/ of the build's context are used alone, without any index.
ARG BASE=python:3.11-slim-bookworm

# What both stages have: the compiler makes the C++ operators now, and optimised forms of models
# later, in builds.
FROM ${BASE} AS base
RUN command -v g++ >/dev/null || (apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*)
ENV PATH=/opt/tapeout/bin:$PATH
WORKDIR /opt/tapeout/source

FROM base AS install
ARG TORCH=torch==2.13.0
ARG ONNXRUNTIME=onnxruntime==1.31.1
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
COPY pyproject.toml requirements.lock wheel[s] /tmp/wheels/
RUN python3 -m venv /opt/tapeout \
    && mv /tmp/wheels/pyproject.toml /tmp/wheels/requirements.lock . \
    && if ls /tmp/wheels/*.whl >/dev/null 2>&1; then export PIP_NO_INDEX=1 PIP_FIND_LINKS=/tmp/wheels; fi \
    && mkdir -p app runtime migrations && touch app/__init__.py runtime/__init__.py \
    && pip install --quiet ${TORCH} \
    && pip install --quiet -c requirements.lock ${ONNXRUNTIME} "setuptools>=77" \
    && pip install --quiet -c requirements.lock --no-build-isolation -e .
COPY app app
COPY runtime runtime
COPY migrations migrations
COPY templates templates
COPY docs docs
RUN python -m runtime.execution.native && python -m compileall -q app runtime migrations

FROM base
COPY --from=install /opt/tapeout /opt/tapeout
# Nobody in particular: what is mounted at /data belongs to this number.
RUN useradd --uid 10001 --home-dir /data --shell /usr/sbin/nologin tapeout \
    && install -d -o tapeout -g tapeout -m 0755 /data /run/tapeout
USER tapeout
ENV TAPEOUT_DATA_DIR=/data PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=6 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/healthz', timeout=4)"]
ENTRYPOINT ["tapeout"]
CMD ["serve", "--host", "0.0.0.0"]
