FROM registry.kiln/dev/busybox
COPY . /all
