# syntax=docker/dockerfile:1.7
# The image of every service of docker-compose.yml that is Python: the Prefect server, workers, Dask, memory3 itself.
#
# One image and one lock, constraints.txt: so the Prefect server and its clients, and Dask's scheduler and workers,
# cannot differ. The usual build of torch for Linux brings CUDA's libraries, some gigabytes; for a build for CPUs name
# the index that has it: docker compose build --build-arg PIP_EXTRA_INDEX_URL=...

FROM python:3.11.14-slim-bookworm AS build
ARG PIP_EXTRA_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/memory3
# What is installed changes less often than the code, and is a layer of its own.
COPY constraints.txt pyproject.toml ./
RUN mkdir -p schemas pipelines model flows \
    && touch README.md LICENSE schemas/__init__.py \
    && /opt/memory3/bin/python -m pip install -c constraints.txt hatchling==1.28.0 trove-classifiers==2026.9.21.13 \
    && /opt/memory3/bin/python -m pip install --no-build-isolation -c constraints.txt '.[dask]' \
    && /opt/memory3/bin/python -m pip uninstall --yes memory3
COPY README.md LICENSE ./
COPY schemas schemas
COPY pipelines pipelines
COPY model model
COPY flows flows
RUN /opt/memory3/bin/python -m pip install --no-build-isolation --no-deps -c constraints.txt . \
    && /opt/memory3/bin/python -m pip uninstall --yes hatchling

FROM python:3.11.14-slim-bookworm
# libgomp is what FAISS and torch share their threads with; Debian keeps one version of it in a release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 memory3 \
    && mkdir -p /var/lib/memory3 /var/lib/prefect /corpus \
    && chown memory3:memory3 /var/lib/memory3 /var/lib/prefect
COPY --from=build /opt/memory3 /opt/memory3
ENV PATH=/opt/memory3/bin:$PATH PYTHONUNBUFFERED=1 DO_NOT_TRACK=1 PREFECT_SERVER_ANALYTICS_ENABLED=false
USER 10001
WORKDIR /var/lib/memory3
CMD ["memory3", "--help"]
