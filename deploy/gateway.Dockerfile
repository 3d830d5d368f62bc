# The gateway: no torch, no model. Any number of replicas run side by side.
FROM python:3.12-slim

WORKDIR /opt/promptmill
# First what it needs, for packages that are empty yet: a change of ours fetches none of it again.
COPY pyproject.toml constraints.txt ./
RUN mkdir engine producer worker && touch README.md \
    && pip install --no-cache-dir -c constraints.txt ".[gateway,s3]"
COPY README.md LICENSE ./
COPY engine engine
COPY producer producer
COPY worker worker
RUN pip install --no-cache-dir --no-deps --force-reinstall .

RUN useradd --system --uid 10001 --no-create-home promptmill \
    && mkdir -p /var/lib/promptmill/files && chown promptmill /var/lib/promptmill/files
USER 10001
ENV PROMPTMILL_FILES=/var/lib/promptmill/files
VOLUME /var/lib/promptmill/files
ENV PYTHONUNBUFFERED=1
EXPOSE 8000

STOPSIGNAL SIGTERM
CMD ["promptmill", "gateway"]
