# One image a role: docker build --target ROLE -t sluice/ROLE:0.1.0 .
# Roles: controller, loader, loader-demo (with the default model inside), worker-cpu, worker-cuda, load (ghz and its recipes).

FROM debian:12-slim AS build
WORKDIR /src
COPY dev .
RUN ./dev setup
COPY . .
RUN ./dev build

FROM build AS build-cuda
RUN ./dev setup --cuda && ./dev build

# The libraries that the programs are linked to, and an unprivileged user.
FROM debian:12-slim AS runtime
RUN apt-get update \
  && apt-get install -y --no-install-recommends libabsl20220623 libfmt9 libgrpc++1.51 libhwy1 libprotobuf32 libspdlog1.10 \
  && rm -rf /var/lib/apt/lists/*
USER 65532:65532

FROM runtime AS controller
COPY --from=build /src/build/bin/sluice-controller /src/build/bin/sluice /usr/local/bin/
EXPOSE 50051 7501 9400
ENTRYPOINT ["sluice-controller"]

FROM runtime AS loader
COPY --from=build /src/build/bin/sluice-loader /usr/local/bin/
EXPOSE 7510 9400
ENTRYPOINT ["sluice-loader"]

FROM loader AS loader-demo
COPY --from=build /root/.cache/sluice/models/SmolLM2-135M-Instruct.Q4_1.gguf /models/

FROM runtime AS worker-cpu
COPY --from=build /src/build/bin/sluice-worker /usr/local/bin/
EXPOSE 7520 9400
ENTRYPOINT ["sluice-worker"]

# CUDA's runtime is linked statically; the driver's library comes from the node, through the NVIDIA container runtime.
FROM runtime AS worker-cuda
COPY --from=build-cuda /src/build/bin/sluice-worker /src/k8s/images/worker-group /usr/local/bin/
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
EXPOSE 7520 9400
ENTRYPOINT ["sluice-worker"]

FROM golang:1.24-bookworm AS ghz
RUN GOTOOLCHAIN=local go install github.com/bojand/ghz/cmd/ghz@v0.93.0

FROM debian:12-slim AS load
RUN apt-get update && apt-get install -y --no-install-recommends python3-minimal && rm -rf /var/lib/apt/lists/*
COPY --from=ghz /go/bin/ghz /usr/local/bin/
COPY tests/load /load
USER 65532:65532
ENTRYPOINT ["/load/run"]
