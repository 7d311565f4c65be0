FROM registry.kiln/dev/busybox
COPY app /app
