version 1.0

workflow virnucpro_embed {
    meta {
        description: "Embed a FASTA file of proteins in shards, a task each, and merge them into one HDF5 file."
        allowNestedInputs: true
    }

    parameter_meta {
        fasta: "Proteins, plain or gz, bz2, xz, zst."
        name: "Name of the output, without .h5."
        model: "Name of a model, fetched by each task; see `virnucpro models`."
        weights: "Weights as a file instead: a fair-esm .pt or a .safetensors file. Needs no internet access."
        options: "More options of `virnucpro embed` as a shell reads them, such as --pool mean,std. The output has the file of --qc as a table if its name ends in .tsv, and the proteins of --from contigs."
        shards: "Number of tasks that share the proteins, at least 1."
        gpu_count: "GPUs of each task; none if not given."
        gpu_type: "Their type, as the platform names it."
        docker: "Image of virnucpro; with CUDA for GPUs."
    }

    input {
        File fasta
        String name = "embeddings"
        String model = "650M"
        File? weights
        String options = ""
        Int shards = 1
        Int? gpu_count
        String? gpu_type
        String docker = if defined(gpu_count) then "@CONTAINER_GPU@" else "@CONTAINER_CPU@"
    }

    call plan {
        input:
            fasta = fasta,
            model = model,
            weights = weights,
            options = options,
            shards = shards,
            docker = docker
    }

    scatter (index in range(shards)) {
        call embed {
            input:
                fasta = fasta,
                model = model,
                weights = weights,
                options = options,
                shard = index + 1,
                shards = shards,
                output_gb = plan.output_gb / shards + 1,
                gpu_count = gpu_count,
                gpu_type = gpu_type,
                docker = docker
        }
    }

    call merge {
        input:
            shards = embed.h5,
            name = name,
            output_gb = plan.output_gb,
            docker = docker
    }

    output {
        File embeddings = merge.h5
        File plan_report = plan.report
        Array[File] reports = embed.report
        Array[File] tables = flatten(embed.tables)
        Array[File] proteins = select_all(embed.proteins) # the same of every shard
        File merge_report = merge.report
        String virnucpro_version = merge.virnucpro_version
    }
}

task plan {
    meta {
        description: "Count proteins and the size of the output. No weights are read."
    }

    input {
        File fasta
        String model
        File? weights
        String options
        Int shards
        String docker
        Int cpu = 2
        Int memory_gb = 8
    }

    Int disk_gb = ceil(4 * size(fasta, "GB") + size(weights, "GB")) + 20
    String quote = "'\"'\"'" # for ' between two of them

    command <<<
        set -euo pipefail
        if [ ~{shards} -lt 1 ]; then
            echo "shards is ~{shards}: at least 1 is needed" >&2
            exit 2
        fi
        virnucpro embed '~{sub(fasta, "'", quote)}' \
            --output plan.h5 \
            --model '~{if defined(weights) then sub(select_first([weights]), "'", quote) else sub(model, "'", quote)}' \
            --device cpu \
            --dry-run \
            --report plan.json \
            ~{options}
        python3 -c 'import json; print(json.load(open("plan.json"))["counts"]["output bytes (estimate)"] // 10**9 + 1)' >output_gb
    >>>

    output {
        File report = "plan.json"
        Int output_gb = read_int("output_gb")
    }

    runtime {
        docker: docker
        cpu: cpu
        memory: "~{memory_gb} GB"
        disks: "local-disk ~{disk_gb} HDD"
    }
}

task embed {
    meta {
        description: "Embed one of several parts of the proteins."
    }

    input {
        File fasta
        String model
        File? weights
        String options
        Int shard
        Int shards
        Int output_gb
        Int? gpu_count
        String? gpu_type
        String docker
        Int cpu = 4
        Int memory_gb = 16
        Int preemptible = 1
    }

    # A fetched model takes up to 60 GB (15B).
    Int disk_gb = ceil(4 * size(fasta, "GB") + size(weights, "GB")) + output_gb + 80
    String quote = "'\"'\"'" # for ' between two of them

    command <<<
        set -euo pipefail
        export OMP_NUM_THREADS=~{cpu}
        code=0
        virnucpro embed '~{sub(fasta, "'", quote)}' \
            --output embeddings.h5 \
            --shard ~{shard}/~{shards} \
            --model '~{if defined(weights) then sub(select_first([weights]), "'", quote) else sub(model, "'", quote)}' \
            ~{if defined(gpu_count) then "--device cuda --workers " + gpu_count else "--device cpu"} \
            --report shard-~{shard}-of-~{shards}.json \
            ~{options} || code=$?
        [ "$code" = 0 ] || [ "$code" = 3 ] || exit "$code" # 3: finished, some records were skipped
    >>>

    output {
        File h5 = glob("embeddings.shard-*.h5")[0]
        File report = "shard-~{shard}-of-~{shards}.json"
        Array[File] tables = glob("*.tsv")
        File? proteins = "embeddings.proteins.faa"
    }

    runtime {
        docker: docker
        cpu: cpu
        memory: "~{memory_gb} GB"
        disks: "local-disk ~{disk_gb} HDD"
        gpu: defined(gpu_count)
        gpuCount: gpu_count
        gpuType: gpu_type
        preemptible: preemptible
    }
}

task merge {
    meta {
        description: "Make one file of all shards, in the order of the FASTA file."
    }

    input {
        Array[File] shards
        String name
        Int output_gb
        String docker
        Int cpu = 2
        Int memory_gb = 8
    }

    Int disk_gb = 2 * output_gb + 20
    String quoted = "'" + sub(name, "'", "'\"'\"'") + "'"

    command <<<
        set -euo pipefail
        while IFS= read -r shard || [ -n "$shard" ]; do ln -s "$shard" ~{quoted}."${shard##*/embeddings.}"; done <'~{write_lines(shards)}'
        code=0
        virnucpro merge ~{quoted}.h5 --of ~{length(shards)} --report ~{quoted}.json || code=$?
        [ "$code" = 0 ] || [ "$code" = 3 ] || exit "$code" # 3: done, some records were skipped by their shards
        virnucpro --version | sed 's/virnucpro //' >version
    >>>

    output {
        File h5 = "~{name}.h5"
        File report = "~{name}.json"
        String virnucpro_version = read_string("version")
    }

    runtime {
        docker: docker
        cpu: cpu
        memory: "~{memory_gb} GB"
        disks: "local-disk ~{disk_gb} HDD"
    }
}
