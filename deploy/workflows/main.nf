// The four stages of an archive, one process for each stage and shard, and one job of them all at the end:
//   nextflow run deploy/workflows/main.nf --slides /archive --out out --shards 16 --encoder uni -profile docker
// Slides are read where they lie (a folder that all nodes see, or URLs); what goes from process to process is the job.
nextflow.enable.dsl = 2

params.slides = null
params.out = 'out'
params.shards = 4
params.resolutions = '20x,5x'
params.encoder = 'texture'
params.settings = ''

def each_of(String flag, value) { value.toString().split(',').collect { "${flag} '${it}'" }.join(' ') }

// Exit code 1: some slides failed, which failures.csv of the job says. That stops no others.
def accept() { '|| [ $? -eq 1 ]' }

def shard_of(shard) { "--shard ${shard}/${params.shards}" }

process SEGMENT {
    tag "shard ${shard}"
    cpus 2

    input:
    val shard

    output:
    tuple val(shard), path('job')

    script:
    def settings = params.settings ? "--config '${params.settings}'" : ''
    """
    wsi-pipe segment '${params.slides}' -o job ${settings} ${shard_of(shard)} ${accept()}
    """

    stub:
    """
    mkdir job && echo segment > job/stages
    """
}

process TILE {
    tag "shard ${shard}"
    cpus 2
    // Each process works on a copy: what was handed on before stays as it was, so that -resume holds.
    stageInMode 'copy'

    input:
    tuple val(shard), path('before')

    output:
    tuple val(shard), path('job')

    script:
    """
    mv before job
    wsi-pipe tile '${params.slides}' -o job ${each_of('-r', params.resolutions)} ${shard_of(shard)} ${accept()}
    """

    stub:
    """
    mv before job && echo tile >> job/stages
    """
}

process EXTRACT {
    tag "shard ${shard}"
    label 'gpu'
    cpus 8
    stageInMode 'copy'

    input:
    tuple val(shard), path('before')

    output:
    tuple val(shard), path('job')

    script:
    """
    mv before job
    wsi-pipe extract '${params.slides}' -o job ${each_of('-r', params.resolutions)} ${each_of('-e', params.encoder)} \
        ${shard_of(shard)} ${accept()}
    """

    stub:
    """
    mv before job && echo extract >> job/stages
    """
}

process ASSEMBLE {
    tag "shard ${shard}"
    cpus 2
    stageInMode 'copy'

    input:
    tuple val(shard), path('before')

    output:
    path 'job'

    script:
    """
    mv before job
    wsi-pipe assemble '${params.slides}' -o job ${each_of('-r', params.resolutions)} ${each_of('-e', params.encoder)} \
        ${shard_of(shard)} ${accept()}
    """

    stub:
    """
    mv before job && echo assemble >> job/stages
    """
}

process MERGE {
    cpus 2
    publishDir params.out, mode: 'copy'

    input:
    path 'shard*'

    output:
    path 'job'

    script:
    """
    for shard in shard*; do
        if [ ! -d job ]; then cp -aL "\$shard" job; continue; fi
        for part in tissue tiles thumbnails bags; do
            if [ -d "\$shard/\$part" ]; then mkdir -p "job/\$part" && cp -an "\$shard/\$part/." "job/\$part"; fi
        done
    done
    wsi-pipe run '${params.slides}' -o job ${each_of('-r', params.resolutions)} ${each_of('-e', params.encoder)} ${accept()}
    wsi-pipe verify job
    """

    stub:
    """
    mkdir job && cat shard*/stages > job/stages
    """
}

workflow {
    if (!params.slides) { error 'name the slides: --slides /archive' }
    shards = Channel.of(1..(params.shards as int))
    SEGMENT(shards) | TILE | EXTRACT | ASSEMBLE | collect | MERGE
}
