//
// FASTA_EMBED_VIRNUCPRO: Embed each FASTA file in shards, and merge them into one HDF5 file
//

include { VIRNUCPRO_EMBED } from '../../../modules/nf-core/virnucpro/embed/main'
include { VIRNUCPRO_FETCH } from '../../../modules/nf-core/virnucpro/fetch/main'
include { VIRNUCPRO_MERGE } from '../../../modules/nf-core/virnucpro/merge/main'

workflow FASTA_EMBED_VIRNUCPRO {

    take:
    ch_fasta    // channel: [ val(meta), path(fasta) ]
    val_model   // value:   a model to fetch, or '' for val_weights
    val_weights // value:   [ val(model), path(weights) ] as VIRNUCPRO_EMBED takes them; [ '', [] ] with val_model
    val_shards  // value:   number of tasks that share a FASTA file

    main:
    if (val_shards < 1) {
        error("val_shards is ${val_shards}: at least 1 is needed")
    }
    ch_weights = channel.value(val_weights)
    if (val_model) {
        VIRNUCPRO_FETCH(val_model)
        ch_weights = VIRNUCPRO_FETCH.out.weights
    }

    ch_parts = ch_fasta.flatMap { meta, fasta ->
        (1..val_shards).collect { number -> [meta, fasta, "${number}/${val_shards}".toString()] }
    }
    VIRNUCPRO_EMBED(ch_parts, ch_weights)

    VIRNUCPRO_MERGE(VIRNUCPRO_EMBED.out.h5.groupTuple(size: val_shards, sort: true))

    emit:
    h5       = VIRNUCPRO_MERGE.out.h5       // channel: [ val(meta), path(h5) ]
    report   = VIRNUCPRO_EMBED.out.report   // channel: [ val(meta), path(json) ], one of each shard
    qc       = VIRNUCPRO_EMBED.out.qc       // channel: [ val(meta), path(tsv) ], one of each shard with --qc
    proteins = VIRNUCPRO_EMBED.out.proteins // channel: [ val(meta), path(faa) ], the same of each shard with --from contigs
}
