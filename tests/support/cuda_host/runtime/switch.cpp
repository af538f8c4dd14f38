// The stack switch of fiber.h: fifteen instructions, because ucontext's costs two system calls a switch.
asm(R"(.text
.globl cuda_host_switch
.type cuda_host_switch,@function
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_host_switch,.-cuda_host_switch
)");
