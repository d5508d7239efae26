# A run in a container:
#     docker build -t distfit .
#     docker run --rm -v "$PWD/runs:/job/runs" distfit --strategy=mirrored --virtual_devices=2
# Your own modules are found when they are mounted into /job.
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

COPY . /source
RUN pip install -c /source/constraints.txt /source && rm -rf /source

WORKDIR /job
ENTRYPOINT ["python", "-m", "launch"]
