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
    // exit code 3: done, some records were skipped by their shards
    """
    virnucpro merge \\
        --report ${prefix}.json \\
        ${args} \\
        ${prefix}.h5 \\
        || [ \$? -eq 3 ]
    """

    stub:
    prefix = task.ext.prefix ?: "${meta.id}"
    """
    touch ${prefix}.h5
    touch ${prefix}.json
    """
}
