process VIRNUCPRO_EMBED {
    tag "$meta.id"
    label 'process_medium'
    label 'process_gpu'

    conda "${moduleDir}/environment.yml"
    container 'biocontainers/virnucpro:0.1.0--pyhdfd78af_0'

    input:
    tuple val(meta), path(fasta)
    path weights

    output:
    tuple val(meta), path("*.h5")  , emit: h5
    tuple val(meta), path("*.json"), emit: report
    tuple val("${task.process}"), val('virnucpro'), eval("virnucpro --version | sed 's/virnucpro //'"), topic: versions, emit: versions_virnucpro

    when:
    task.ext.when == null || task.ext.when

    script:
    def args = task.ext.args ?: ''
    def prefix = task.ext.prefix ?: "${meta.id}"
    def model = weights ? "--model ${weights}" : ''
    // exit code 3: finished, some records were skipped
    """
    export OMP_NUM_THREADS=${task.cpus}
    virnucpro embed \\
        ${fasta} \\
        --output ${prefix}.h5 \\
        --report ${prefix}.json \\
        ${model} \\
        ${args} \\
        || [ \$? -eq 3 ]
    """

    stub:
    def prefix = task.ext.prefix ?: "${meta.id}"
    """
    touch ${prefix}.h5
    touch ${prefix}.json
    """
}
