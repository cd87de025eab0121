process VIRNUCPRO_EMBED {
    tag "$meta.id"
    label 'process_medium'

    conda "${ task.accelerator ? "${moduleDir}/environment.gpu.yml" : "${moduleDir}/environment.yml" }"
    container "${ workflow.containerEngine in ['singularity', 'apptainer'] && !task.ext.singularity_pull_docker_container ?
        (task.accelerator ? '@SINGULARITY_GPU@' : '@SINGULARITY_CPU@') :
        (task.accelerator ? '@CONTAINER_GPU@' : '@CONTAINER_CPU@') }"

    input:
    tuple val(meta), path(fasta), val(shard)
    tuple val(model), path(weights)

    output:
    tuple val(meta), path("*.h5")          , emit: h5
    tuple val(meta), path("*.json")        , emit: report
    tuple val(meta), path("*.tsv")         , emit: qc      , optional: true
    tuple val(meta), path("*.proteins.faa"), emit: proteins, optional: true
    tuple val("${task.process}"), val('virnucpro'), eval("virnucpro --version | sed 's/virnucpro //'"), topic: versions, emit: versions_virnucpro
    tuple val("${task.process}"), val('cuda'), eval('python -c "import torch; print(torch.version.cuda or \'no CUDA available\')"'), topic: versions, emit: versions_cuda

    when:
    task.ext.when == null || task.ext.when

    script:
    def args = task.ext.args ?: ''
    def prefix = (task.ext.prefix ?: "${meta.id}").replace("'", "'\\''") // for quotation marks
    def cache = model && weights ? "export XDG_CACHE_HOME=\$PWD/${weights} HF_HUB_CACHE=\$PWD/${weights} TORCH_HOME=\$PWD/${weights}" : ''
    def source = model || weights ? "--model ${model ?: weights}" : ''
    def device = task.accelerator ? "--device cuda --workers ${task.accelerator.request}" : '--device cpu'
    def part = shard ? "--shard ${shard}" : ''
    def name = shard ? "${prefix}.shard-${shard.tokenize('/').collect { number -> number.padLeft(4, '0') }.join('-of-')}" : prefix
    // exit code 3: finished, some records were skipped
    """
    export OMP_NUM_THREADS=${task.cpus}
    ${cache}
    virnucpro embed \\
        ${fasta} \\
        --output '${prefix}.h5' \\
        --report '${name}.json' \\
        ${source} \\
        ${device} \\
        ${part} \\
        ${args} \\
        || [ \$? -eq 3 ]
    """

    stub:
    def prefix = (task.ext.prefix ?: "${meta.id}").replace("'", "'\\''") // for quotation marks
    def name = shard ? "${prefix}.shard-${shard.tokenize('/').collect { number -> number.padLeft(4, '0') }.join('-of-')}" : prefix
    """
    touch '${name}.h5'
    touch '${name}.json'
    """
}
