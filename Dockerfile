# docker build -t anser .
# docker run -p 127.0.0.1:8000:8000 -v ./models:/models:ro anser serve --host 0.0.0.0 --model /models/model.pth
#
# On NVIDIA GPUs: --build-arg RUNTIME=nvidia/cuda:13.0.1-runtime-ubuntu24.04 (it brings cuBLASLt), and docker run --gpus all.
ARG RUNTIME=debian:bookworm-slim

FROM rust:1-slim-bookworm AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --release --locked -p anser-cli && cp target/release/anser /usr/local/bin/anser

FROM ${RUNTIME}
# Object stores and Redis over TLS are checked against these.
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates && rm -rf /var/lib/apt/lists/* \
    && install -d -o 10001 -g 10001 /states
COPY --from=build /usr/local/bin/anser /usr/local/bin/anser
USER 10001:10001
WORKDIR /states
VOLUME /states
EXPOSE 8000
# With another port, or over TLS, give docker run another --health-cmd.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s CMD ["bash", "-c", \
    "exec 3<>/dev/tcp/127.0.0.1/8000 && printf 'GET /health HTTP/1.0\\r\\nHost: localhost\\r\\n\\r\\n' >&3 && head -n 1 <&3 | grep -q ' 200 '"]
ENTRYPOINT ["anser"]
# Without keys nobody but this container reaches it: --host 0.0.0.0 and --api-keys or ANSER_API_KEYS open it.
CMD ["serve"]
