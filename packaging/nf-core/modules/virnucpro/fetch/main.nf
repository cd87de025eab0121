process VIRNUCPRO_FETCH {
    tag "$model"
    label 'process_single'

    conda "${moduleDir}/environment.yml"
    container "${ workflow.containerEngine in ['singularity', 'apptainer'] && !task.ext.singularity_pull_docker_container ?
        '@SINGULARITY_CPU@' :
        '@CONTAINER_CPU@' }"

    input:
    val model

    output:
    tuple val(model), path("weights"), emit: weights
    tuple val("${task.process}"), val('virnucpro'), eval("virnucpro --version | sed 's/virnucpro //'"), topic: versions, emit: versions_virnucpro

    when:
    task.ext.when == null || task.ext.when

    script:
    def args = task.ext.args ?: ''
    """
    mkdir weights
    export XDG_CACHE_HOME=\$PWD/weights HF_HUB_CACHE=\$PWD/weights TORCH_HOME=\$PWD/weights
    virnucpro fetch \\
        ${args} \\
        ${model}
    """

    stub:
    """
    mkdir weights
    """
}
