process VIRNUCPRO_MERGE {
    tag "$meta.id"
    label 'process_low'

    conda "${moduleDir}/environment.yml"
    container "${ workflow.containerEngine in ['singularity', 'apptainer'] && !task.ext.singularity_pull_docker_container ?
        '@SINGULARITY_CPU@' :
        '@CONTAINER_CPU@' }"

    input:
    tuple val(meta), path(shards)

    output:
    tuple val(meta), path("${prefix}.h5")  , emit: h5
    tuple val(meta), path("${prefix}.json"), emit: report
    tuple val("${task.process}"), val('virnucpro'), eval("virnucpro --version | sed 's/virnucpro //'"), topic: versions, emit: versions_virnucpro

    when:
    task.ext.when == null || task.ext.when

    script:
    def args = task.ext.args ?: ''
    prefix = task.ext.prefix ?: "${meta.id}"
    def quoted = prefix.replace("'", "'\\''")
    // the shards say of which output they are; exit code 3: done, some records were skipped by their shards
    """
    shards=(*.shard-*.h5)
    whole=\${shards%.shard-*}.h5
    virnucpro merge \\
        --report '${quoted}.json' \\
        ${args} \\
        "\$whole" \\
        || [ \$? -eq 3 ]
    [ "\$whole" = '${quoted}.h5' ] || mv "\$whole" '${quoted}.h5'
    """

    stub:
    prefix = task.ext.prefix ?: "${meta.id}"
    def quoted = prefix.replace("'", "'\\''")
    """
    touch '${quoted}.h5'
    touch '${quoted}.json'
    """
}
