// Runs the Relax function `main` of a library on raw files, through the C ABI of tvm_ffi alone:
//
//   runner LIBRARY OUTPUT_PREFIX [CODE:BITS:LANES:DIM,DIM,...:FILE]...
//
// Where the library has a plan of a run (hone_run), that must return the same bytes as the virtual
// machine. One argument per input, in order. Writes <prefix>0.bin, <prefix>1.bin, ... and prints a line
// "CODE BITS LANES DIM DIM ..." for each output. C, not C++: libc++ of a cross compiler and
// libstdc++ of the runtime cannot share a process. The runtime library is opened, not linked,
// because nothing here calls it by name: it registers the virtual machine as it loads.
#include <dlfcn.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

enum { kMaxDims = 16, kMaxInputs = 256, kAlignment = 64 };

static void Fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fputc('\n', stderr);
  exit(1);
}

static void Check(int status, const char* what) {
  if (status == 0) return;
  TVMFFIObjectHandle error = NULL;
  TVMFFIErrorMoveFromRaised(&error);
  if (error == NULL) Fail("%s failed", what);
  const TVMFFIErrorCell* cell = (const TVMFFIErrorCell*)((const char*)error + sizeof(TVMFFIObject));
  Fail("%s failed: %.*s: %.*s", what, (int)cell->kind.size, cell->kind.data,
       (int)cell->message.size, cell->message.data);
}

static TVMFFIObjectHandle Global(const char* name) {
  TVMFFIByteArray key = {name, strlen(name)};
  TVMFFIObjectHandle function = NULL;
  Check(TVMFFIFunctionGetGlobal(&key, &function), name);
  if (function == NULL) Fail("the runtime has no function %s", name);
  return function;
}

static TVMFFIAny Int(int64_t value) {
  TVMFFIAny any = {.type_index = kTVMFFIInt, .v_int64 = value};
  return any;
}

static TVMFFIAny Bool(int value) {
  TVMFFIAny any = {.type_index = kTVMFFIBool, .v_int64 = value};
  return any;
}

static TVMFFIAny String(const char* text) {
  TVMFFIAny any = {.type_index = kTVMFFIRawStr, .v_c_str = text};
  return any;
}

static TVMFFIAny Call(TVMFFIObjectHandle function, TVMFFIAny* arguments, int count,
                      const char* what) {
  TVMFFIAny result = {.type_index = kTVMFFINone};
  Check(TVMFFIFunctionCall(function, arguments, count, &result), what);
  return result;
}

static TVMFFIObjectHandle Find(TVMFFIAny module, const char* name) {
  TVMFFIAny arguments[] = {module, String(name), Bool(1)};
  TVMFFIAny function = Call(Global("ffi.ModuleGetFunction"), arguments, 3, name);
  return function.type_index == kTVMFFIFunction ? function.v_obj : NULL;
}

static TVMFFIObjectHandle Method(TVMFFIAny module, const char* name) {
  TVMFFIObjectHandle function = Find(module, name);
  if (function == NULL) Fail("the library has no function %s", name);
  return function;
}

static const DLTensor* Tensor(TVMFFIAny value) {
  return (const DLTensor*)((const char*)value.v_obj + sizeof(TVMFFIObject));
}

static size_t Bytes(const DLTensor* tensor) {
  size_t count = 1;
  for (int axis = 0; axis < tensor->ndim; ++axis) count *= (size_t)tensor->shape[axis];
  return (count * tensor->dtype.bits * tensor->dtype.lanes + 7) / 8;
}

static TVMFFIAny ReadInput(char* spec) {
  static int64_t shapes[kMaxInputs][kMaxDims];
  static DLManagedTensor tensors[kMaxInputs];
  static int used = 0;
  if (used == kMaxInputs) Fail("more than %d inputs", kMaxInputs);
  int64_t* shape = shapes[used];
  DLManagedTensor* managed = &tensors[used++];

  char* rest = spec;
  DLDataType dtype;
  dtype.code = (uint8_t)strtol(rest, &rest, 10);
  dtype.bits = (uint8_t)strtol(rest + 1, &rest, 10);
  dtype.lanes = (uint16_t)strtol(rest + 1, &rest, 10);
  int ndim = 0;
  for (++rest; *rest != ':'; rest += *rest == ',') {
    if (ndim == kMaxDims) Fail("more than %d dimensions: %s", kMaxDims, spec);
    char* end = rest;
    shape[ndim++] = strtoll(rest, &end, 10);
    if (end == rest) Fail("not CODE:BITS:LANES:DIMS:FILE: %s", spec);
    rest = end;
  }
  const char* path = rest + 1;

  managed->dl_tensor.device.device_type = kDLCPU;
  managed->dl_tensor.ndim = ndim;
  managed->dl_tensor.dtype = dtype;
  managed->dl_tensor.shape = shape;
  size_t size = Bytes(&managed->dl_tensor);
  size_t capacity = (size / kAlignment + 1) * kAlignment;
  managed->dl_tensor.data = aligned_alloc(kAlignment, capacity);
  FILE* file = fopen(path, "rb");
  if (file == NULL) Fail("cannot read %s", path);
  if (fread(managed->dl_tensor.data, 1, size, file) != size || fgetc(file) != EOF)
    Fail("%s does not hold exactly %zu bytes", path, size);
  fclose(file);

  TVMFFIAny tensor = {.type_index = kTVMFFITensor};
  TVMFFIObjectHandle handle = NULL;
  Check(TVMFFITensorFromDLPack(managed, kAlignment, 1, &handle), path);
  tensor.v_obj = (TVMFFIObject*)handle;
  return tensor;
}

static void WriteOutput(TVMFFIAny value, const char* prefix, int index) {
  if (value.type_index != kTVMFFITensor)
    Fail("output %d is not a tensor but of type index %d", index, (int)value.type_index);
  const DLTensor* tensor = Tensor(value);
  char path[4096];
  snprintf(path, sizeof path, "%s%d.bin", prefix, index);
  FILE* file = fopen(path, "wb");
  if (file == NULL) Fail("cannot write %s", path);
  const char* data = (const char*)tensor->data + tensor->byte_offset;
  size_t size = Bytes(tensor);
  if (fwrite(data, 1, size, file) != size || fclose(file) != 0) Fail("cannot write %s", path);
  printf("%d %d %d", tensor->dtype.code, tensor->dtype.bits, tensor->dtype.lanes);
  for (int axis = 0; axis < tensor->ndim; ++axis) printf(" %" PRId64, tensor->shape[axis]);
  putchar('\n');
}

static void* Aligned(size_t size) {
  return aligned_alloc(kAlignment, (size / kAlignment + 1) * kAlignment);
}

static const TVMFFISeqCell* Fields(TVMFFIAny array) {
  return (const TVMFFISeqCell*)((const char*)array.v_obj + sizeof(TVMFFIObject));
}

// Requires that the planned run returns what the virtual machine did.
static void CheckPlan(TVMFFIAny library, TVMFFIAny machine, const TVMFFIAny* inputs, int count,
                      const TVMFFIAny* outputs, int results) {
  TVMFFIObjectHandle run = Find(library, "hone_run");
  if (run == NULL) return;
  TVMFFIAny size = Call(Method(library, "hone_workspace_bytes"), NULL, 0, "hone_workspace_bytes");
  TVMFFIAny constants = Call(Method(machine, "hone_constants"), NULL, 0, "hone_constants");
  const TVMFFISeqCell* weights = Fields(constants);
  void** table = calloc(1 + count + results + weights->size, sizeof(void*));
  void** next = table;
  *next++ = Aligned(size.v_int64);
  for (int index = 0; index < count; ++index) *next++ = Tensor(inputs[index])->data;
  void** written = next;
  for (int index = 0; index < results; ++index) *next++ = Aligned(Bytes(Tensor(outputs[index])));
  for (int index = 0; index < weights->size; ++index)
    *next++ = Tensor(((const TVMFFIAny*)weights->data)[index])->data;
  TVMFFIAny argument = Int((int64_t)(intptr_t)table);
  for (int repetition = 0; repetition < 2; ++repetition) Call(run, &argument, 1, "hone_run");
  for (int index = 0; index < results; ++index) {
    const DLTensor* tensor = Tensor(outputs[index]);
    if (memcmp((const char*)tensor->data + tensor->byte_offset, written[index], Bytes(tensor)) != 0)
      Fail("output %d of the plan is not that of the virtual machine", index);
  }
}

int main(int argc, char** argv) {
  if (argc < 3) Fail("usage: runner LIBRARY OUTPUT_PREFIX [CODE:BITS:LANES:DIMS:FILE]...");
  if (argc - 3 > kMaxInputs) Fail("more than %d inputs", kMaxInputs);
  if (dlopen("libtvm_runtime.so", RTLD_NOW | RTLD_GLOBAL) == NULL) Fail("%s", dlerror());

  TVMFFIAny path = String(argv[1]);
  TVMFFIAny library = Call(Global("ffi.ModuleLoadFromFile"), &path, 1, argv[1]);
  const char* threads = getenv("TVM_NUM_THREADS");
  TVMFFIObjectHandle configure = Find(library, "hone_threads");
  if (configure != NULL && threads != NULL) {
    TVMFFIAny count = Int(strtol(threads, NULL, 10));
    Call(configure, &count, 1, "hone_threads");
  }
  TVMFFIAny machine = Call(Method(library, "vm_load_executable"), NULL, 0, "vm_load_executable");
  // Device type, device id and allocator (2 is pooled), of the host and of the device.
  TVMFFIAny devices[] = {Int(kDLCPU), Int(0), Int(2), Int(kDLCPU), Int(0), Int(2)};
  Call(Method(machine, "vm_initialization"), devices, 6, "vm_initialization");

  TVMFFIAny inputs[kMaxInputs];
  for (int index = 3; index < argc; ++index) inputs[index - 3] = ReadInput(argv[index]);
  TVMFFIAny result = Call(Method(machine, "main"), inputs, argc - 3, "main");

  const TVMFFIAny* outputs = &result;
  int results = 1;
  if (result.type_index == kTVMFFIArray) {
    outputs = Fields(result)->data;
    results = (int)Fields(result)->size;
  }
  for (int index = 0; index < results; ++index) WriteOutput(outputs[index], argv[2], index);
  CheckPlan(library, machine, inputs, argc - 3, outputs, results);
  return 0;
}
