# The guest of the accelerator probe: 64-bit x86, without firmware or operating system.
#
# It does, in the order in which a kernel does them, the things that a hypervisor must get right for
# any 64-bit kernel to run, and checks every result: real mode, protected mode, long mode with 4-level
# paging in the upper half, CPUID and MSRs, SSE, page faults and demand mapping, invlpg, switching of
# address spaces, ring 3 with syscall/sysret, faults and interrupts, timers that wake it from hlt, and
# a stretch of plain computing, which gives away a hypervisor that interprets instead of running.
#
# Reports   on the debug console (port 0xe9): a letter per stage passed, at last "=undercroft-guest-ok".
#           Exit code through isa-debug-exit (port 0xf4): 0x2a all is well; 0x15 after "!" and the vector
#           (hex) of an exception nobody expected; 0x16 after "?": a wrong result.
# Loaded    as firmware: accelerator_guest.py puts these bytes at F000:0000 and a jump to them into the
#           reset vector. They copy themselves to 0x10000, where they are linked to run.
# Assembled as --64 -o guest.o accelerator_guest.s
#           ld -m elf_x86_64 -Ttext=0x10000 -e start --oformat binary -o accelerator_guest.bin guest.o
# Manuals   Intel SDM volume 3, chapters 4, 6, 9 and 11; AMD64 APM volume 2, chapters 5, 6, 8 and 14.

        .set HIGH, 0xffffffff80000000           # the kernel's half: physical 0 is mapped here
        .set DIRECT, 0xffff888000000000         # and here, as Linux' direct map is
        .set WINDOW, HIGH + 0x1000000           # 4 KiB pages mapped one by one through PT_WINDOW
        .set SWITCHED, 0x10000000000            # backed by another frame in each of two address spaces
        .set USER_CODE, 0x400000
        .set USER_STACK_TOP, 0x402000
        .set LAPIC, WINDOW + 0x10000

        # Physical memory. Everything from 0x60000 to 0x7ffff is zeroed first.
        .set STACK_TOP, 0x5f000
        .set FRAME_A, 0x60000
        .set FRAME_B, 0x61000
        .set FRAME_USER_CODE, 0x62000
        .set FRAME_USER_STACK, 0x63000
        .set TSS, 0x64000
        .set IDT, 0x65000
        .set ARENA, 0x66000                     # two pages: what the computing works on
        .set PML4, 0x70000
        .set PML4_OTHER, 0x71000
        .set PDPT_LOW, 0x72000
        .set PD_LOW, 0x73000
        .set PDPT_HIGH, 0x74000
        .set PD_HIGH, 0x75000
        .set PT_WINDOW, 0x76000
        .set PDPT_USER, 0x77000
        .set PD_USER, 0x78000
        .set PT_USER, 0x79000
        .set PDPT_A, 0x7a000
        .set PD_A, 0x7b000
        .set PT_A, 0x7c000
        .set PDPT_B, 0x7d000
        .set PD_B, 0x7e000
        .set PT_B, 0x7f000

        .set PRESENT, 1
        .set WRITE, 2
        .set USER, 4
        .set UNCACHED, 0x10
        .set LARGE, 0x80
        .set KERNEL_RW, PRESENT | WRITE
        .set USER_RW, PRESENT | WRITE | USER

        .set MSR_APIC_BASE, 0x1b
        .set MSR_PAT, 0x277
        .set MSR_EFER, 0xc0000080
        .set MSR_STAR, 0xc0000081
        .set MSR_LSTAR, 0xc0000082
        .set MSR_FMASK, 0xc0000084
        .set MSR_GS_BASE, 0xc0000101
        .set MSR_KERNEL_GS_BASE, 0xc0000102

        .set CODE32, 0x08
        .set DATA, 0x10
        .set CODE64, 0x18
        .set USER_DATA, 0x28 | 3                # order fixed by sysret: STAR + 8 is SS, STAR + 16 is CS
        .set USER_CODE64, 0x30 | 3
        .set TSS_SELECTOR, 0x38

        .set ROUNDS, 100                        # of what is repeated because one success proves little
        .set WORK, 1000000                      # iterations of the computing, about 15 instructions each
        .set WORK_RESULT, 0x2f828691994d5286    # what they come to (a test computes it anew)

        .macro stage letter
        mov $\letter, %al
        out %al, $0xe9
        .endm

        .macro expect what, where               # a wrong result ends the probe
        cmp \what, \where
        jne wrong
        .endm

        .macro expect_long what, where
        cmpl \what, \where
        jne wrong
        .endm

        .text
        .globl start
        .code16
start:
        cli
        cld
        stage 'R'
        mov $0xf000, %ax
        mov %ax, %ds
        mov $0x1000, %ax
        mov %ax, %es
        xor %si, %si
        xor %di, %di
        mov $((end - start + 1) / 2), %cx
        rep movsw                               # from ROM to RAM at 0x10000, where it was linked to run
        ljmp $0x1000, $(in_ram - start)
in_ram:
        mov %cs, %ax
        mov %ax, %ds
        lgdtl gdt_pointer - start
        mov %cr0, %eax
        or $1, %eax
        mov %eax, %cr0
        ljmpl $CODE32, $protected

        .code32
protected:
        mov $DATA, %eax
        mov %eax, %ds
        mov %eax, %es
        mov %eax, %ss
        mov $STACK_TOP, %esp
        stage 'P'

        mov $FRAME_A, %edi
        mov $0x8000, %ecx
        xor %eax, %eax
        rep stosl

        movl $(PDPT_LOW | KERNEL_RW), PML4 + 0 * 8
        movl $(PDPT_LOW | KERNEL_RW), PML4 + 273 * 8            # DIRECT
        movl $(PDPT_HIGH | KERNEL_RW), PML4 + 511 * 8
        movl $(PD_LOW | KERNEL_RW), PDPT_LOW
        movl $(PD_HIGH | KERNEL_RW), PDPT_HIGH + 510 * 8
        movl $(PT_WINDOW | KERNEL_RW), PD_HIGH + 8 * 8
        movl $(PDPT_A | USER_RW), PML4 + 2 * 8                  # SWITCHED
        movl $(PD_A | USER_RW), PDPT_A
        movl $(PT_A | USER_RW), PD_A
        movl $(FRAME_A | USER_RW), PT_A
        movl $(PD_B | USER_RW), PDPT_B
        movl $(PT_B | USER_RW), PD_B
        movl $(FRAME_B | USER_RW), PT_B
        movl $(PD_USER | USER_RW), PDPT_USER
        movl $(PT_USER | USER_RW), PD_USER + 2 * 8              # 0x400000
        movl $(FRAME_USER_CODE | PRESENT | USER), PT_USER
        movl $(FRAME_USER_STACK | USER_RW), PT_USER + 1 * 8
        mov $(LARGE | KERNEL_RW), %eax
        xor %ecx, %ecx
1:      mov %eax, PD_LOW(, %ecx, 8)
        mov %eax, PD_HIGH(, %ecx, 8)
        add $0x200000, %eax
        inc %ecx
        cmp $8, %ecx
        jne 1b

        mov %cr4, %eax
        or $0x6a0, %eax                         # PAE, PGE, OSFXSR, OSXMMEXCPT
        mov %eax, %cr4
        mov $PML4, %eax
        mov %eax, %cr3
        mov $MSR_EFER, %ecx
        rdmsr
        or $0x101, %eax                         # LME, SCE
        wrmsr
        mov %cr0, %eax
        and $0x9ffffff3, %eax                   # not CD, NW, EM, TS
        or $0x80010022, %eax                    # PG, WP, NE, MP
        mov %eax, %cr0
        ljmp $CODE64, $long_mode

        .code64
long_mode:
        movabs $(HIGH + upper_half), %rax
        jmp *%rax
upper_half:
        movabs $HIGH, %rax
        add %rax, %rsp
        lea gdt(%rip), %rax
        mov %rax, gdt_pointer + 2(%rip)
        lgdt gdt_pointer(%rip)
        stage 'L'

        # Interrupt table: everything unexpected but these. The task state: a stack for coming from ring 3.
        xor %ebx, %ebx
1:      lea unexpected_stubs(%rip), %rax
        lea (%rax, %rbx, 4), %rax               # each stub is 4 bytes
        call set_gate
        inc %ebx
        cmp $32, %ebx
        jne 1b
        mov $14, %ebx
        lea page_fault(%rip), %rax
        call set_gate
        mov $13, %ebx
        lea protection_fault(%rip), %rax
        call set_gate
        mov $0x20, %ebx
        lea tick(%rip), %rax
        call set_gate
        mov $0x21, %ebx
        lea local_tick(%rip), %rax
        call set_gate
        mov $0x80, %ebx
        lea user_interrupt(%rip), %rax
        call set_gate
        orb $0x60, HIGH + IDT + 0x80 * 16 + 5   # callable from ring 3
        movq $(HIGH + STACK_TOP - 0x1000), HIGH + TSS + 4
        movw $0x68, HIGH + TSS + 102
        lidt idt_pointer(%rip)
        mov $TSS_SELECTOR, %eax
        ltr %ax

        # From here the lower half belongs to user programs, as under any kernel.
        movq $(PDPT_USER | USER_RW), HIGH + PML4
        mov %cr3, %rax
        mov %rax, %cr3
        mov $HIGH + PML4, %rsi                  # the second address space differs in SWITCHED alone
        mov $HIGH + PML4_OTHER, %rdi
        mov $512, %ecx
        rep movsq
        movq $(PDPT_B | USER_RW), HIGH + PML4_OTHER + 2 * 8

        # CPUID and MSRs
        mov $0x80000001, %eax
        cpuid
        bt $29, %edx                            # long mode
        jnc wrong
        mov $MSR_EFER, %ecx
        rdmsr
        bt $10, %eax                            # long mode active
        jnc wrong
        mov $MSR_APIC_BASE, %ecx
        rdmsr
        and $0xfffff900, %eax
        expect $0xfee00900, %eax             # enabled, bootstrap processor
        mov $MSR_PAT, %ecx
        rdmsr
        wrmsr
        mov $MSR_GS_BASE, %ecx
        lea gs_kernel(%rip), %rax
        call write_msr
        mov $MSR_KERNEL_GS_BASE, %ecx
        lea gs_user(%rip), %rax
        call write_msr
        mov %gs:0, %eax
        expect $0x6b65726e, %eax
        swapgs
        mov %gs:0, %eax
        swapgs
        expect $0x75736572, %eax
        mov $MSR_STAR, %ecx
        movabs $((USER_DATA - 8) << 48 | CODE64 << 32), %rax
        call write_msr
        mov $MSR_LSTAR, %ecx
        lea syscall_entry(%rip), %rax
        call write_msr
        mov $MSR_FMASK, %ecx
        mov $0x700, %eax                        # clears IF, TF, DF
        call write_msr
        stage 'M'

        # SSE
        mov $3, %eax
        cvtsi2sd %eax, %xmm0
        sqrtsd %xmm0, %xmm1
        mulsd %xmm1, %xmm1
        subsd %xmm0, %xmm1
        mulsd %xmm1, %xmm1                      # (sqrt(3)^2 - 3)^2: tiny, not zero
        pxor %xmm2, %xmm2
        ucomisd %xmm2, %xmm1
        jbe wrong
        movq %xmm0, %rax
        movabs $0x4008000000000000, %rbx
        expect %rbx, %rax
        stage 'S'

        # Page faults: demand mapping, protection, invlpg, two address spaces, again and again
        mov $ROUNDS, %ebp
page_round:
        movq $0, HIGH + PT_WINDOW
        mov $WINDOW, %rdi
        invlpg (%rdi)
        movl $0, fault_count(%rip)
        movq $(FRAME_A | KERNEL_RW), fault_entry(%rip)          # the handler maps the page and returns
        lea 8(%rbp), %rax
        mov %rax, (%rdi)
        movq $0, fault_entry(%rip)
        expect_long $1, fault_count(%rip)
        expect_long $2, fault_error(%rip)                         # a write to a page not present
        mov fault_address(%rip), %rbx
        expect %rdi, %rbx
        movabs $(DIRECT + FRAME_A), %rbx
        expect (%rbx), %rax                                  # the same frame through the direct map

        movq $(FRAME_A | PRESENT), HIGH + PT_WINDOW             # now read-only
        invlpg (%rdi)
        lea 1f(%rip), %rbx
        mov %rbx, fault_resume(%rip)
        movq $0, (%rdi)
        jmp wrong
1:      expect_long $2, fault_count(%rip)
        expect_long $3, fault_error(%rip)                         # a write to a page present
        expect (%rdi), %rax

        not %rax
        mov %rax, HIGH + FRAME_B
        movq $(FRAME_B | KERNEL_RW), HIGH + PT_WINDOW           # another frame under the same address
        invlpg (%rdi)
        expect (%rdi), %rax

        movabs $SWITCHED, %rbx                                  # FRAME_A here, FRAME_B in the other space
        mov $PML4_OTHER, %ecx
        mov $PML4, %edx
        mov %rcx, %cr3
        expect (%rbx), %rax
        mov %rdx, %cr3
        not %rax
        expect (%rbx), %rax
        dec %ebp
        jnz page_round
        stage 'F'

        # Ring 3: the program below is entered with iretq and returns with int $0x80.
        lea user_program(%rip), %rsi
        mov $HIGH + FRAME_USER_CODE, %rdi
        mov $(user_program_end - user_program), %ecx
        rep movsb
        movl $0, fault_count(%rip)
        movl $0, protection_count(%rip)
        movl $0, syscall_count(%rip)
        mov $(USER_CODE + user_resume - user_program), %eax
        mov %rax, fault_resume(%rip)
        mov %rax, protection_resume(%rip)
        lea user_done(%rip), %rax
        mov %rax, user_return(%rip)
        mov %rsp, kernel_stack(%rip)
        push $USER_DATA
        push $USER_STACK_TOP
        push $0x2
        push $USER_CODE64
        push $USER_CODE
        iretq
user_done:
        expect_long $ROUNDS, syscall_count(%rip)
        expect_long $ROUNDS, fault_count(%rip)
        expect_long $ROUNDS, protection_count(%rip)
        expect_long $5, fault_error(%rip)                         # a read by the user of a page present
        stage 'U'

        # Interrupts: the interval timer through the 8259, then the local APIC's own, each waking from hlt
        mov $0x11, %al
        out %al, $0x20
        out %al, $0xa0
        mov $0x20, %al
        out %al, $0x21                          # IRQ 0 is vector 0x20
        mov $0x28, %al
        out %al, $0xa1
        mov $4, %al
        out %al, $0x21
        mov $2, %al
        out %al, $0xa1
        mov $1, %al
        out %al, $0x21
        out %al, $0xa1
        mov $0xfe, %al                          # IRQ 0 alone
        out %al, $0x21
        mov $0xff, %al
        out %al, $0xa1
        movl $(0xfee00000 | UNCACHED | KERNEL_RW), HIGH + PT_WINDOW + 16 * 8
        mov $LAPIC, %rdi
        invlpg (%rdi)
        movl $0x1ff, 0xf0(%rdi)                 # enabled; spurious vector 0xff
        movl $0x700, 0x350(%rdi)                # LINT0: the 8259
        mov $0x34, %al                          # channel 0, periodic, 1 kHz
        out %al, $0x43
        mov $(1193 & 0xff), %al
        out %al, $0x40
        mov $(1193 >> 8), %al
        out %al, $0x40
1:      sti
        hlt
        cli
        cmpl $5, tick_count(%rip)
        jb 1b
        mov $0xff, %al
        out %al, $0x21
        movl $0x3, 0x3e0(%rdi)                  # divide by 16
        movl $0x21, 0x320(%rdi)                 # one shot, vector 0x21
        mov $5, %ebp
2:      movl $20000, 0x380(%rdi)
        sti
        hlt
        cli
        dec %ebp
        jnz 2b
        expect_long $5, local_tick_count(%rip)
        stage 'T'

        # Computing, long enough that an interpreter misses the time limit by far
        mov $WORK, %ecx
        mov $1, %eax
        xor %edx, %edx
        movabs $6364136223846793005, %rbx
        mov $HIGH + ARENA, %rdi
1:      imul %rbx, %rax                         # Knuth's MMIX generator
        add $1442695, %rax
        mov %rax, %rsi
        shr $52, %rsi
        xor %rax, (%rdi, %rsi)
        add (%rdi, %rsi), %rdx
        rol $7, %rdx
        call mix
        test $1, %dl
        jz 2f
        add %rcx, %rdx
2:      dec %ecx
        jnz 1b
        movabs $WORK_RESULT, %rbx
        expect %rbx, %rdx
        stage 'W'

        lea token(%rip), %rsi
        mov $token_length, %ecx
        mov $0xe9, %edx
        rep outsb
        mov $0x2a, %al
        out %al, $0xf4
1:      hlt
        jmp 1b

mix:    xor %rsi, %rdx
        ret

wrong:
        stage '?'
        mov $0x16, %al
        out %al, $0xf4
1:      cli
        hlt
        jmp 1b

# Ring 3. Copied to USER_CODE; position independent.
user_program:
        mov $ROUNDS, %ebp
1:      mov %ebp, %edi
        push %rbp
        syscall                                 # the kernel answers rdi * 3 in rax
        pop %rbp
        lea (%rbp, %rbp, 2), %ecx
        cmp %ecx, %eax
        jne user_wrong
        xor %ebx, %ebx
        movabs $(HIGH + FRAME_A), %rsi
        mov (%rsi), %rax                        # not the user's: a page fault, goes on at user_resume
        jmp user_wrong
user_resume:
        inc %ebx
        cmp $1, %ebx
        jne 2f
        cli                                     # not allowed either: a protection fault, goes on at user_resume
        jmp user_wrong
2:      dec %ebp
        jnz 1b
        int $0x80
user_wrong:
        ud2
user_program_end:

syscall_entry:
        incl syscall_count(%rip)
        lea (%rdi, %rdi, 2), %eax
        sysretq

# int $0x80 from ring 3: the program has ended; the kernel carries on with its own stack.
user_interrupt:
        mov 8(%rsp), %rax
        expect $USER_CODE64, %rax
        mov kernel_stack(%rip), %rsp
        jmp *user_return(%rip)

page_fault:
        push %rax
        push %rbx
        mov %cr2, %rax
        mov %rax, fault_address(%rip)
        mov 16(%rsp), %rbx
        mov %ebx, fault_error(%rip)
        incl fault_count(%rip)
        mov fault_entry(%rip), %rbx
        test %rbx, %rbx
        jz 1f
        mov %rbx, HIGH + PT_WINDOW
        jmp 2f
1:      mov fault_resume(%rip), %rbx
        mov %rbx, 24(%rsp)
2:      pop %rbx
        pop %rax
        add $8, %rsp
        iretq

protection_fault:
        push %rax
        incl protection_count(%rip)
        mov protection_resume(%rip), %rax
        mov %rax, 16(%rsp)
        pop %rax
        add $8, %rsp
        iretq

tick:
        push %rax
        incl tick_count(%rip)
        mov $0x20, %al
        out %al, $0x20
        pop %rax
        iretq

local_tick:
        incl local_tick_count(%rip)
        movl $0, LAPIC + 0xb0                   # end of interrupt
        iretq

# An exception nobody expected: its vector as two hex digits.
unexpected_stubs:
        .set vector, 0
        .rept 32
        push $vector
        jmp unexpected
        .set vector, vector + 1
        .endr
unexpected:
        pop %rbx
        stage '!'
        mov %bl, %al
        shr $4, %al
        call hex_digit
        mov %bl, %al
        and $15, %al
        call hex_digit
        mov $0x15, %al
        out %al, $0xf4
1:      cli
        hlt
        jmp 1b

hex_digit:
        add $'0', %al
        cmp $'9', %al
        jbe 1f
        add $('a' - '0' - 10), %al
1:      out %al, $0xe9
        ret

# rbx: vector; rax: handler. An interrupt gate (interrupts off), ring 0.
set_gate:
        mov %ebx, %edx
        shl $4, %edx
        lea HIGH + IDT(%rdx), %rdi
        mov %ax, (%rdi)
        movw $CODE64, 2(%rdi)
        movw $0x8e00, 4(%rdi)
        shr $16, %rax
        mov %ax, 6(%rdi)
        shr $16, %rax
        mov %eax, 8(%rdi)
        ret

# ecx: register; rax: value. Read back and compared.
write_msr:
        mov %rax, %rdx
        mov %rax, %rbx
        shr $32, %rdx
        wrmsr
        rdmsr
        shl $32, %rdx
        or %rdx, %rax
        expect %rbx, %rax
        ret

        .balign 8, 0
gdt:
        .quad 0
        .quad 0x00cf9b000000ffff                # CODE32
        .quad 0x00cf93000000ffff                # DATA
        .quad 0x00af9b000000ffff                # CODE64
        .quad 0
        .quad 0x00cff3000000ffff                # USER_DATA
        .quad 0x00affb000000ffff                # USER_CODE64
        .quad ((HIGH + TSS) & 0xffffff) << 16 | ((HIGH + TSS) >> 24 & 0xff) << 56 | 0x890000000067
        .quad (HIGH + TSS) >> 32 & 0xffffffff
gdt_end:
gdt_pointer:
        .word gdt_end - gdt - 1
        .quad gdt
idt_pointer:
        .word 0xfff
        .quad HIGH + IDT

        .balign 8, 0
fault_address: .quad 0
fault_resume: .quad 0
fault_entry: .quad 0
protection_resume: .quad 0
user_return: .quad 0
kernel_stack: .quad 0
fault_error: .long 0
fault_count: .long 0
protection_count: .long 0
syscall_count: .long 0
tick_count: .long 0
local_tick_count: .long 0
gs_kernel: .long 0x6b65726e
gs_user: .long 0x75736572
token:  .ascii "=undercroft-guest-ok\n"
        .set token_length, . - token
end:
