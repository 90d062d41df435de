"""``croft completion``: what makes a shell ask croft at every TAB.

The scripts only pass on what was typed: everything is decided by ``croft __complete``, so that all
shells know the same and nothing grows old. (That costs a start of Python per TAB: about 60 ms on a
slow machine, where argcomplete takes 30 more.)
"""

from __future__ import annotations

from undercroft.cli.command import Command, Namespace, Parser
from undercroft.cli.errors import OK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from undercroft.cli.context import Croft

_BASH = r"""# bash completion of croft; see: croft help completion
_croft() {
    local line=${COMP_LINE:0:COMP_POINT} words cur prefix reply candidate
    read -ra words <<<"$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    cur=${words[${#words[@]} - 1]}
    COMPREPLY=()
    while IFS= read -r reply; do
        candidate=${reply%%$'\t'*}
        if [[ $candidate == :files ]]; then
            # Not by "compopt -o filenames": that would quote the colon of VM:/PATH, too.
            while IFS= read -r candidate; do
                [[ -d ${candidate/#\~/$HOME} ]] && candidate+=/ && compopt -o nospace
                COMPREPLY+=("$(printf '%q' "$candidate" | sed 's/^\\~/~/')")
            done < <(compgen -f -- "$cur")
            continue
        fi
        [[ $candidate == */ ]] && compopt -o nospace
        COMPREPLY+=("$candidate")
    done < <("${words[0]}" __complete "${words[@]:1}" 2>/dev/null)
    # Where the colon separates words, bash replaces only what follows the last one.
    if [[ $cur == *:* && $COMP_WORDBREAKS == *:* ]]; then
        prefix=${cur%"${cur##*:}"}
        COMPREPLY=("${COMPREPLY[@]#"$prefix"}")
    fi
}
complete -F _croft croft
"""

_ZSH = r"""#compdef croft
# zsh completion of croft; see: croft help completion
_croft() {
    local -a lines described
    local line candidate about
    lines=("${(@f)$("${words[1]}" __complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    for line in $lines; do
        [[ -n $line ]] || continue
        candidate=${line%%$'\t'*}
        if [[ $candidate == :files ]]; then
            _files
            continue
        fi
        about=${line#*$'\t'}
        [[ $about == $line ]] && about=
        described+=("${candidate//:/\\:}${about:+:$about}")
    done
    (( $#described )) && _describe -V croft described
}
if [[ $funcstack[1] == _croft ]]; then _croft "$@"; else compdef _croft croft; fi
"""

_FISH = r"""# fish completion of croft; see: croft help completion
function __croft_complete
    set -l words (commandline -opc) (commandline -ct)
    for line in (command $words[1] __complete $words[2..-1] 2>/dev/null)
        if test "$line" = ":files"
            __fish_complete_path (commandline -ct)
        else
            printf '%s\n' $line
        end
    end
end
complete -c croft -f -a '(__croft_complete)'
"""

_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


class Completion(Command):
    """``croft completion SHELL``"""

    description = """
        Prints a script that makes the shell complete commands, options, and names of VMs, images
        and tasks. script/setup installs the one for bash by itself.
    """
    examples = (
        ('eval "$(croft completion bash)"', "now; or in ~/.bashrc"),
        ("croft completion zsh > ~/.zfunc/_croft", "with ~/.zfunc in your fpath"),
        ("croft completion fish > ~/.config/fish/completions/croft.fish", "fish"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("shell", choices=tuple(_SCRIPTS), help="your shell")

    def run(self, croft: Croft, args: Namespace) -> int:
        print(_SCRIPTS[args.shell], end="")
        return OK
