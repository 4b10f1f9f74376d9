# minilm: cuda13.0, torch2.13-cu130, weights mount. Rendered by inferctl 0.1.0.

# The base with its interpreter, without build tools. The torch wheels contain the CUDA libraries.
FROM nvidia/cuda:13.0.3-base-ubuntu24.04 AS python
# A mirror of the base may already have the interpreter. apt reads the certificates as another user (mode 0444).
RUN --mount=type=secret,id=ca,target=/run/secrets/ca,mode=0444 \
    if [ -x /usr/bin/python3.12 ]; then exit 0; fi; \
    ca=; if [ -s /run/secrets/ca ]; then ca="--option=Acquire::https::CAInfo=/run/secrets/ca"; fi; \
    apt-get $ca update && apt-get $ca install --yes --no-install-recommends python3 && \
    rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/cache/apt/* /var/cache/ldconfig

FROM python AS installer
RUN --mount=type=secret,id=ca,target=/run/secrets/ca,mode=0444 \
    if /usr/bin/python3.12 -m pip --version > /dev/null 2>&1; then exit 0; fi; \
    ca=; if [ -s /run/secrets/ca ]; then ca="--option=Acquire::https::CAInfo=/run/secrets/ca"; fi; \
    apt-get $ca update && apt-get $ca install --yes --no-install-recommends python3-pip

# Each closure is installed in its own stage and copied with --link, so that a change in one does not change the layers
# of the others. Bytecode is hash-checked and all file times are fixed, so that equal locks give equal layers.
FROM installer AS torch
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/run/secrets/ca \
    --mount=type=bind,source=locks/torch.txt,target=/locks/torch.txt \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi; \
    env -u PIP_CONSTRAINT /usr/bin/python3.12 -m pip install --require-hashes --no-deps --no-compile --no-input \
        --disable-pip-version-check --root-user-action=ignore \
        --target=/layer/opt/inferctl/torch \
        --requirement=/locks/torch.txt && \
    find /layer/opt/inferctl/torch -name '*.dist-info' -prune \
        -o \( -path /layer/opt/inferctl/torch/bin -o -type d -name include -o -type d -name tests -o -name '*.a' -o -path '*/torch/bin/protoc*' \) -prune -exec rm -rf {} + && \
    /usr/bin/python3.12 -m compileall -q -j 0 -x '/torch/testing/_internal/py312_intrinsics\.py$' --invalidation-mode unchecked-hash /layer/opt/inferctl/torch && \
    find /layer -exec touch --no-dereference --date=@315532800 {} +

FROM installer AS server-dependencies
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/run/secrets/ca \
    --mount=type=bind,source=locks/server.txt,target=/locks/server.txt \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi; \
    env -u PIP_CONSTRAINT /usr/bin/python3.12 -m pip install --require-hashes --no-deps --no-compile --no-input \
        --disable-pip-version-check --root-user-action=ignore \
        --target=/layer/opt/inferctl/dependencies \
        --requirement=/locks/server.txt && \
    find /layer/opt/inferctl/dependencies -name '*.dist-info' -prune \
        -o \( -path /layer/opt/inferctl/dependencies/bin -o -type d -name include -o -type d -name tests -o -name '*.a' -o -path '*/torch/bin/protoc*' \) -prune -exec rm -rf {} + && \
    /usr/bin/python3.12 -m compileall -q -j 0 -x '/torch/testing/_internal/py312_intrinsics\.py$' --invalidation-mode unchecked-hash /layer/opt/inferctl/dependencies && \
    find /layer -exec touch --no-dereference --date=@315532800 {} +

FROM python AS server
RUN --mount=type=bind,source=layers/server,target=/context cp -R /context /layer && \
    find /layer -exec chmod u=rwX,go=rX {} + && find /layer -exec touch --no-dereference --date=@315532800 {} +

FROM python AS config
RUN --mount=type=bind,source=layers/config,target=/context cp -R /context /layer && \
    find /layer -exec chmod u=rwX,go=rX {} + && find /layer -exec touch --no-dereference --date=@315532800 {} +

FROM python
COPY --link --from=torch /layer /
COPY --link --from=server-dependencies /layer /
COPY --link --from=server /layer /
COPY --link --from=config /layer /

ENV PYTHONPATH=/opt/inferctl/server:/opt/inferctl/dependencies:/opt/inferctl/torch \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    USER=inferctl \
    HF_HUB_OFFLINE=1 \
    INFERCTL_MODEL_SOURCE=/model \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TORCH_DISABLE_NATIVE_JIT=1 \
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0 \
    INFERCTL_SERVE_PORT=8080
# Kubernetes can verify that a numeric user is not root. The user owns no files and writes only to /tmp.
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=180s --retries=3 \
    CMD ["/usr/bin/python3.12", "-m", "inferctl.serve.health", "8080"]
LABEL \
    org.opencontainers.image.title="minilm" \
    org.opencontainers.image.version="auto-HASH" \
    org.opencontainers.image.source="https://example.com/team/minilm" \
    org.opencontainers.image.revision="0123abc" \
    org.opencontainers.image.created="2026-01-02T03:04:05+00:00" \
    org.opencontainers.image.base.name="nvidia/cuda:13.0.3-base-ubuntu24.04" \
    io.inferctl.version="0.1.0" \
    io.inferctl.content.sha256="HASH" \
    io.inferctl.precision="auto" \
    io.inferctl.stack="torch2.13-cu130" \
    io.inferctl.model.source="sentence-transformers/all-MiniLM-L6-v2" \
    io.inferctl.model.weights="mount"
# `docker run IMAGE --precision bf16` appends options. If an option occurs twice, the last one counts.
ENTRYPOINT ["/usr/bin/python3.12", "-m", "inferctl.serve", "--spec", "/etc/inferctl/inferctl.yaml", "--host", "0.0.0.0"]
