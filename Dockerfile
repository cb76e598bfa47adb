# Any Debian-like base with Python 3.11 or newer and its venv module will do: BASE_IMAGE=python:3.11-slim, or a plain
# Debian with python3-venv. The same base serves both stages, so that the copied environment finds its interpreter.
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS build
# Where PyTorch comes from besides the default index. Empty: the index's own build, on Linux the CUDA one.
# For a machine without a GPU: the address of PyTorch's CPU builds, from the "Get started" page of PyTorch's site.
ARG TORCH_INDEX_URL=""
# Extras of pyproject.toml, separated by commas: "ui" is the page at /; "ui,otel" traces besides.
ARG EXTRAS="ui"
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python3 -m venv /opt/wavespeed
ENV PATH=/opt/wavespeed/bin:$PATH

# Dependencies first: their layer, gigabytes with CUDA, outlives changes of the code.
COPY pyproject.toml constraints.txt ./
RUN python -c 'import os, tomllib; \
project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
extras = [name.strip() for name in os.environ["EXTRAS"].split(",") if name.strip()]; \
lines = project["dependencies"] + [line for name in extras for line in project["optional-dependencies"][name]]; \
print("\n".join(lines))' > requirements.txt \
    && python -m pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} \
        --constraint constraints.txt --requirement requirements.txt

COPY README.md LICENSE ./
COPY cache cache
COPY models models
COPY app app
# Without what only a build needs: pip, and PyTorch's own tests and C++ headers (200 MB).
RUN python -m pip install --no-deps . \
    && cd "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
    && rm -rf torch/include torch/test torch/bin/protoc* torch/bin/*test* torch/bin/*Test* \
    && python -m pip uninstall --yes pip


FROM ${BASE_IMAGE}
# The base's pip goes too: nothing is installed into a running container.
RUN find / -xdev \( -path '*/python3*/ensurepip' -o -path '*/python3*/*-packages/pip' -o -path '*/python3*/*-packages/pip-*' \
        -o -path '/usr/local/bin/pip*' -o -path /usr/share/python-wheels \) -prune -exec rm -rf {} + \
    && groupadd --gid 10001 wavespeed \
    && useradd --uid 10001 --gid wavespeed --no-create-home --home-dir /tmp --shell /usr/sbin/nologin wavespeed \
    && mkdir --parents /srv/wavespeed/logs /srv/wavespeed/jobs /srv/wavespeed/hub /srv/wavespeed/models \
    && chown --recursive wavespeed:wavespeed /srv/wavespeed
COPY --from=build /opt/wavespeed /opt/wavespeed

# The root file system may be read-only: only logs/, jobs/ and /tmp are written to, and hub/ where HF_HUB_OFFLINE=0 lets
# models be fetched.
ENV PATH=/opt/wavespeed/bin:$PATH \
    HOME=/tmp \
    HF_HOME=/srv/wavespeed/hub \
    HF_HUB_OFFLINE=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    WAVESPEED_HOST=0.0.0.0 \
    WAVESPEED_PORT=7861
WORKDIR /srv/wavespeed
# By number: a cluster that demands a user other than root cannot look a name up.
USER 10001:10001
VOLUME /srv/wavespeed/logs /srv/wavespeed/jobs
EXPOSE 7861
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 CMD ["python", "-c", "\
import http.client, os, sys; \
c = http.client.HTTPConnection('127.0.0.1', int(os.environ['WAVESPEED_PORT']), timeout=4); \
c.request('GET', '/livez'); \
sys.exit(c.getresponse().status != 200)"]
CMD ["wavespeed", "serve"]
