# syntax=docker/dockerfile:1
# docker build -t expertgate .                              the CUDA build of the engine
# docker build -t expertgate:cpu --build-arg VARIANT=cpu .  the CPU's
#
# Pin the base image to what you have examined; both stages take the same one:
#   docker buildx imagetools inspect python:3.11.14-slim-bookworm
#   docker build --build-arg PYTHON_IMAGE=python@sha256:... .
ARG PYTHON_IMAGE=docker.io/library/python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG VARIANT=cuda
ENV PIP_NO_CACHE_DIR=1
WORKDIR /src
# The locks by themselves: a change of our own code does not fetch the engine again.
COPY requirements/ requirements/
RUN requirements/install.sh python /opt/expertgate "${VARIANT}" runtime
COPY pyproject.toml README.md LICENSE ./
COPY expertgate/ expertgate/
RUN /opt/expertgate/bin/python -m pip install --no-deps --no-build-isolation .

FROM ${PYTHON_IMAGE}
ARG VARIANT=cuda
# The engine compiles small pieces of C++ while it starts (torch.compile, Triton's launchers). The
# headers of Python that it needs come with the base image.
# Debian keeps one version of each package at a time, so there is none to name.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ libnuma1 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --user-group --create-home expertgate \
 && chmod 755 /home/expertgate
COPY --from=build /opt/expertgate /opt/expertgate
# All caches lie under HOME. It, /tmp and /dev/shm are all that must be writable.
# USER, because some libraries ask for a name, which an arbitrary user id doesn't have.
ENV PATH=/opt/expertgate/bin:${PATH} \
    HOME=/home/expertgate \
    USER=expertgate \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
# A number, so that Kubernetes can tell that it isn't root.
USER 10001:10001
# expertgate.yaml and what it names.
WORKDIR /etc/expertgate
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["expertgate"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
# Last: a commit changes it, and nothing above is made anew for that.
ARG REVISION=unknown
LABEL org.opencontainers.image.title="expertgate" \
      org.opencontainers.image.description="An inference server for FlexOlmo mixtures of experts, each request with the experts its user may consult" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      expertgate.engine="${VARIANT}"
