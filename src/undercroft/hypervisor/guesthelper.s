# The helper that waits in a guest for its clones: it carries out the system calls that the host sends.
#
# It is put into the guest before its memory is frozen, and waits there in read(2). In each clone it
# gets one batch of calls that make the clone somebody else (`undercroft.host.individuality`), answers
# with what they returned, and ends. A clone begins without any translated or cached code, so what
# takes the fewest instructions in the guest is what takes the least time: no program is started,
# nothing is parsed, and what to do is decided by the host.
#
# Descriptor 0 is the virtio-serial port, open for reading and writing. A batch, little-endian:
#           0   u32  bytes of the whole batch (at most SIZE)
#           4   u32  number of calls
#           8        calls of 64 bytes: u64 number, six u64 arguments, u64 flags
#           …        data that calls point to
# Flags     bit n    argument n is an offset from the begin of the batch
#           bit 8+n  argument n is the number of an earlier call: its result is taken
# Answer    the batch up to the data, each call's number replaced by its result. End of file ends it.
# Assembled as --64 -o helper.o guesthelper.s
#           ld -m elf_x86_64 -n -s -z noseparate-code -o guesthelper.bin helper.o
# Manuals   syscall(2); System V ABI, AMD64 supplement, A.2.1.

        .set SIZE, 0x10000
        .set READ, 0
        .set WRITE, 1
        .set EXIT, 60

        .globl _start
        .text
_start: lea     batch(%rip), %rbx
begin:  xor     %ebp, %ebp                      # bytes there
fill:   mov     $READ, %eax
        xor     %edi, %edi
        lea     (%rbx,%rbp), %rsi
        mov     $SIZE, %edx
        sub     %rbp, %rdx
        syscall
        test    %rax, %rax
        jle     end
        add     %rax, %rbp
        cmp     $8, %rbp
        jb      fill
        mov     (%rbx), %eax
        cmp     $SIZE, %eax
        ja      end                             # nonsense
        cmp     %rax, %rbp
        jb      fill

        lea     8(%rbx), %r12                   # the call
        mov     4(%rbx), %r13d                  # how many are left
call:   test    %r13d, %r13d
        jz      answer
        mov     56(%r12), %r14
        lea     8(%r12), %r15                   # the argument
        mov     $6, %ecx
argument:
        test    $1, %r14d
        jz      1f
        add     %rbx, (%r15)
1:      test    $0x100, %r14d
        jz      2f
        mov     (%r15), %rax
        shl     $6, %rax
        mov     8(%rbx,%rax), %rax
        mov     %rax, (%r15)
2:      shr     %r14
        add     $8, %r15
        dec     %ecx
        jnz     argument
        mov     (%r12), %rax
        mov     8(%r12), %rdi
        mov     16(%r12), %rsi
        mov     24(%r12), %rdx
        mov     32(%r12), %r10
        mov     40(%r12), %r8
        mov     48(%r12), %r9
        syscall
        mov     %rax, (%r12)
        add     $64, %r12
        dec     %r13d
        jmp     call

answer: mov     %rbx, %rsi
write:  mov     $WRITE, %eax
        xor     %edi, %edi
        mov     %r12, %rdx
        sub     %rsi, %rdx
        jz      begin
        syscall
        test    %rax, %rax
        jle     end
        add     %rax, %rsi
        jmp     write

end:    mov     $EXIT, %eax
        xor     %edi, %edi
        syscall

        .bss
        .align  4096
batch:  .skip   SIZE
