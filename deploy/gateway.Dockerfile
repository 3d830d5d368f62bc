# The gateway: no torch, no model. Any number of replicas run side by side.
FROM python:3.12-slim

WORKDIR /opt/promptmill
COPY pyproject.toml constraints.txt README.md CHANGELOG.md LICENSE ./
COPY engine engine
COPY producer producer
COPY worker worker
RUN pip install --no-cache-dir -c constraints.txt ".[gateway,s3]"

RUN useradd --system --uid 10001 --no-create-home promptmill
USER promptmill
ENV PYTHONUNBUFFERED=1
EXPOSE 8000

STOPSIGNAL SIGTERM
CMD ["promptmill", "gateway"]
