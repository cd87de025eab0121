// As much of Nextflow as the modules need: `-v`, `config` and `inspect` for nf-core's linter, and `try`, which runs the
// subworkflow on this host. The sections of a process are Groovy, and Groovy evaluates them.
// Nextflow's strict syntax, containers, executors and resuming are not here.
import groovy.json.JsonOutput
import java.nio.file.Files
import java.nio.file.Path
import java.nio.file.Paths

class Names extends Binding { // a variable that was not set stands for its name, as in `emit: h5` and `val(meta)`
    Names(Map variables) { super(variables) }
    Object getVariable(String name) { hasVariable(name) ? super.getVariable(name) : name }
}

class Channel { // items in order; a value channel gives its item again and again
    List items
    boolean value
    Channel flatMap(Closure of) { new Channel(items: items.collectMany { of(*it) }) }
    Channel groupTuple(Map how) {
        def groups = items.groupBy { it[0] }.collect { key, group -> [key, group.collect { it[1] }.sort()] }
        assert groups.every { it[1].size() == how.size }
        new Channel(items: groups)
    }
}

abstract class Declarations extends Script { // what the sections call
    List path(Map how = [:], pattern) { ['path', pattern] }
    List val(it) { ['val', it] }
    List eval(it) { ['eval', it] }
    List tuple(Map how = [:], Object... parts) { declared << [parts as List, how]; null }
    Object methodMissing(String name, arguments) {
        if (processes[name]) binding.setVariable(name, processes[name](*arguments))
        else directives[name] = arguments[0]
    }
    void error(String message) { throw new IllegalArgumentException(message) }
}

class Nextflow {
    static final Map CPU = [cpus: 1, ext: [:], accelerator: null]
    Path root
    boolean stub
    Map ext = [:] // process name -> its task.ext
    Map answers = [:].withDefault { command -> bash(command, root) } // of `eval`: the same in every task

    static Map sections(Path file) { // name -> text; a section begins with `name:` on a line of its own
        def parts = file.text.split(/(?m)^    (?=(?:input|output|when|script|stub|take|main|emit):$)/)
        def body = parts.drop(1).collectEntries { [it.split(':')[0], it.substring(it.indexOf(':') + 1)] }
        def (_, kind, name) = (parts[0] =~ /(?m)^(process|workflow) (\w+) \{$/)[0]
        def head = parts[0].substring(parts[0].indexOf("$name {") + name.size() + 2)
        head = head.replaceAll(/([?:])\n\s+/, '$1 ') // Groovy 2 knows no lines in a simple string's ${...}
        body.collectEntries { [it.key, it.value.replaceFirst(/\}\s*$/, '')] } + [name: name, head: head]
    }

    // The last value, what was declared, the directives, the variables then.
    static List evaluate(String text, Map variables, boolean names = false) {
        def channel = [value: { new Channel(items: [it], value: true) }]
        def known = [declared: [], directives: [:], processes: [:], channel: channel]
        known.putAll(variables)
        def binding = names ? new Names(known) : new Binding(known)
        def settings = new org.codehaus.groovy.control.CompilerConfiguration(scriptBaseClass: Declarations.name)
        def value = new GroovyShell(Nextflow.classLoader, binding, settings).evaluate(text)
        [value, binding.declared, binding.directives, binding.variables]
    }

    static Map directives(Path file, String engine, Map task) {
        def variables = [workflow: [containerEngine: engine], task: task, moduleDir: file.parent]
        evaluate(sections(file).head, variables + [meta: [id: 'x'], model: 'x'])[2]
    }

    static List inputs(Map process) {
        def single = process.input.replaceAll(/(?m)^    (val|path) (\w+)$/, '    tuple $1($2)')
        evaluate(single, [:], true)[1].collect { it[0] }
    }

    Map run(Path file, List channels) { // emitted name -> channel
        def process = sections(file), rows = channels.findAll { !it.value }.collect { it.items.size() }
        def all = [:].withDefault { new Channel(items: [], value: rows.empty) }
        (rows.max() ?: 1).times { i ->
            Path work = Files.createTempDirectory(root, process.name)
            def variables = [task: CPU + [process: process.name, ext: ext[process.name] ?: [:]]]
            [inputs(process), channels].transpose().each { parts, channel ->
                def item = channel.items[channel.value ? 0 : i]
                [parts, parts.size() == 1 ? [item] : item].transpose().each { part, value ->
                    if (part[0] == 'path') {
                        def files = [value].flatten().findAll()
                        files.each { Files.createSymbolicLink(work.resolve(it.fileName), it) }
                        value = files*.fileName.join(' ')
                    }
                    variables[part[1]] = value
                }
            }
            def (text, _, __, known) = evaluate(process[stub ? 'stub' : 'script'], variables)
            bash(text.toString().stripIndent(), work)
            evaluate(process.output, known, true)[1].each { parts, how ->
                def row = parts.collect { kind, value ->
                    if (kind == 'val') return value
                    if (kind == 'eval') return answers[value.toString()]
                    def matcher = work.fileSystem.getPathMatcher("glob:$value")
                    def found = work.toFile().listFiles()*.toPath().findAll {
                        matcher.matches(it.fileName) && !Files.isSymbolicLink(it)
                    }
                    assert found.size() == 1 || how.optional && found.empty: "$process.name: $value gave $found"
                    found[0]
                }
                if (row.every { it != null }) all[how.emit].items << row
            }
        }
        all
    }

    Map workflow(Path file, List values) { // emitted name -> channel
        def parts = sections(file), names = (parts.take =~ /(?m)^    (\w+) +\/\//).collect { it[1] }
        def variables = [names, values].transpose().collectEntries(), processes = [:]
        (file.text =~ /include \{ (\w+) \} from '(.+)'/).each { _, name, where ->
            processes[name] = { Object... channels ->
                def given = channels.collect { it instanceof Channel ? it : new Channel(items: [it], value: true) }
                [out: run(file.parent.resolve("${where}.nf").normalize(), given)]
            }
        }
        def known = evaluate(parts.main + parts.emit, variables + [processes: processes])[3]
        (parts.emit =~ /(?m)^    (\w+) += /).collect { it[1] }.collectEntries { [it, known[it]] }
    }

    static String bash(String text, Path folder) {
        def builder = new ProcessBuilder('bash', '-euo', 'pipefail', '-c', text).directory(folder.toFile())
        def process = builder.redirectErrorStream(true).start()
        def output = process.inputStream.text.trim()
        assert process.waitFor() == 0: "$text\n$output"
        output
    }
}

def command = args ? args[0] : ''
if (command == '-v') {
    println 'nextflow version 25.10.0.0'
} else if (command == 'config') {
    println '{}'
} else if (command == 'inspect') { // [-profile NAME] -format json FILE
    def engine = '-profile' in args ? args[args.findIndexOf { it == '-profile' } + 1] : 'docker'
    def container = Nextflow.directives(Paths.get(args[-1]), engine, Nextflow.CPU).container
    println JsonOutput.toJson([processes: [[container: container.toString()]]])
} else if (command == 'try') { // a repository of modules, a FASTA file, a folder to work in
    def (repository, fasta, work) = args.drop(1).collect { Paths.get(it).toAbsolutePath() }
    def modules = repository.resolve('modules/nf-core/virnucpro'), embed = modules.resolve('embed/main.nf')
    def gpu = Nextflow.CPU + [accelerator: [request: 2]], chosen = []
    [[Nextflow.CPU, '--device cpu'], [gpu, '--device cuda --workers 2']].each { task, device ->
        ['docker', 'singularity'].each { chosen << Nextflow.directives(embed, it, task).subMap('conda', 'container') }
        def variables = [task: task, meta: [id: 'x'], fasta: 'x.faa', shard: '2/8', model: '650M', weights: 'weights']
        def text = Nextflow.evaluate(Nextflow.sections(embed).script, variables)[0]
        assert text.contains(device)
        println text.stripIndent()
    }
    println chosen.join('\n')
    assert chosen*.container.unique().size() == 4 && chosen*.conda.unique().size() == 2
    def file = repository.resolve('subworkflows/nf-core/fasta_embed_virnucpro/main.nf')
    def odd = "b's \$(touch made)" // a name that no shell may take for commands
    def ext = [VIRNUCPRO_EMBED: [prefix: 'other', args: '--qc records.tsv']]
    [[true, '650M', ['', []], [:]], [false, '', ['random:8M', []], ext]].each { stub, model, weights, settings ->
        def folder = Files.createDirectory(work.resolve(stub ? 'stub' : 'real'))
        def input = new Channel(items: [[[id: 'a'], fasta], [[id: odd], fasta]])
        def out = new Nextflow(root: folder, stub: stub, ext: settings).workflow(file, [input, model, weights, 2])
        def names = { channel -> channel.items.collect { [it[0].id, it[1].fileName.toString()] } }
        assert names(out.h5) == [['a', 'a.h5'], [odd, odd + '.h5']]
        assert names(out.report) == ['a', odd].collectMany { id ->
            ['0001', '0002'].collect { [id, "${stub ? id : 'other'}.shard-${it}-of-0002.json".toString()] }
        }
        assert out.qc.items.size() == (stub ? 0 : 4) && out.proteins.items.empty
        folder.eachFileRecurse { assert it.fileName.toString() != 'made' }
        println "${stub ? 'stub' : 'real'}: ${out.h5.items*.getAt(1)}"
    }
    try {
        new Nextflow(root: work, stub: true).workflow(file, [new Channel(items: []), '', ['random:8M', []], 0])
        assert false: 'no shards were accepted'
    } catch (IllegalArgumentException refusal) {
        println refusal.message
    }
}
