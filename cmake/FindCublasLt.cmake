# SPDX-License-Identifier: Apache-2.0
# Finds the headers and libraries of cuBLASLt and the CUDA runtime, without nvcc and without
# enabling the CUDA language. Input: Python_EXECUTABLE, and optionally TEB_CUDA_ROOT.
#
# Result: the target CublasLt::CublasLt, and CublasLt_INCLUDE_DIRS, CublasLt_LIBRARIES.
#
# Looked at in this order, the first complete one wins, each one passed over is named:
#   1. TEB_CUDA_ROOT (CMake or environment variable), and then nothing else;
#   2. the nvidia-* wheels beside the interpreter's torch: the very library torch loads;
#   3. a CUDA toolkit: CUDAToolkit_ROOT, CUDA_HOME, CUDA_PATH, nvcc's, /usr/local/cuda, /usr.
# Complete means cublasLt.h, cuda_runtime_api.h, and both libraries, of the CUDA major version that
# torch was built for. The compiler's own headers (crt/) may come from another of the places: the
# CUDA 13 runtime wheel has left them to nvidia-cuda-crt, which torch does not bring.

# What the interpreter knows: one line of wheel folders, one line with torch's CUDA version. Its
# purelib is asked beside sys.path, because an isolated pip build hides it from the latter.
set(_teb_query [=[
import importlib.util, os, re, sys, sysconfig
paths = sys.path + [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
paths = [os.path.realpath(path or ".") for path in paths]
wheels = [os.path.join(path, "nvidia") for path in dict.fromkeys(paths)]
print(";".join(path for path in wheels if os.path.isdir(path)))
version = ""
for path in paths:
    if os.path.isfile(os.path.join(path, "torch", "version.py")):
        with open(os.path.join(path, "torch", "version.py")) as file:
            found = re.search(r"^cuda\b.*=\s*'([0-9.]+)'", file.read(), re.MULTILINE)
        version = found.group(1) if found else ""
        break
print(version)
]=])
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c "${_teb_query}"
  OUTPUT_VARIABLE _teb_answer
  RESULT_VARIABLE _teb_failed)
if(_teb_failed)
  message(FATAL_ERROR "${Python_EXECUTABLE} does not run (see above)")
endif()
string(REGEX MATCH "^([^\n]*)\n([^\n]*)\n" _teb_answer "${_teb_answer}")
set(_teb_wheel_dirs "${CMAKE_MATCH_1}")
set(_teb_torch_cuda "${CMAKE_MATCH_2}")
string(REGEX REPLACE "\\..*" "" _teb_major "${_teb_torch_cuda}")

# The candidates, each as three parallel entries: name, include folders, library folders (the
# folders of one candidate separated by '|').
set(_teb_names "")
set(_teb_includes "")
set(_teb_libraries "")

function(_teb_add_candidate name includes libraries)
  string(REPLACE ";" "|" includes "${includes}")
  string(REPLACE ";" "|" libraries "${libraries}")
  set(_teb_names ${_teb_names} "${name}" PARENT_SCOPE)
  set(_teb_includes ${_teb_includes} "${includes}" PARENT_SCOPE)
  set(_teb_libraries ${_teb_libraries} "${libraries}" PARENT_SCOPE)
endfunction()

if(NOT TEB_CUDA_ROOT AND DEFINED ENV{TEB_CUDA_ROOT})
  set(TEB_CUDA_ROOT "$ENV{TEB_CUDA_ROOT}")
endif()
set(_teb_roots "")
if(TEB_CUDA_ROOT)
  set(_teb_roots "${TEB_CUDA_ROOT}")
else()
  foreach(_teb_dir IN LISTS _teb_wheel_dirs)
    # CUDA 13 wheels share nvidia/cu13, those of CUDA 12 have a folder each.
    file(GLOB _teb_include_dirs "${_teb_dir}/cu[0-9]*/include" "${_teb_dir}/cublas/include"
         "${_teb_dir}/cuda_runtime/include" "${_teb_dir}/cuda_nvcc/include")
    file(GLOB _teb_library_dirs "${_teb_dir}/cu[0-9]*/lib" "${_teb_dir}/cublas/lib"
         "${_teb_dir}/cuda_runtime/lib")
    if(_teb_include_dirs)
      _teb_add_candidate("${_teb_dir}" "${_teb_include_dirs}" "${_teb_library_dirs}")
    endif()
  endforeach()
  find_program(TEB_NVCC nvcc)
  mark_as_advanced(TEB_NVCC)
  if(TEB_NVCC)
    get_filename_component(_teb_nvcc_root "${TEB_NVCC}" REALPATH)
    get_filename_component(_teb_nvcc_root "${_teb_nvcc_root}" DIRECTORY)
    get_filename_component(_teb_nvcc_root "${_teb_nvcc_root}" DIRECTORY)
  endif()
  set(_teb_roots "${CUDAToolkit_ROOT}" "$ENV{CUDAToolkit_ROOT}" "$ENV{CUDA_HOME}" "$ENV{CUDA_PATH}"
                 "${_teb_nvcc_root}" /usr/local/cuda /usr)
endif()
set(_teb_arch "${CMAKE_SYSTEM_PROCESSOR}")
list(REMOVE_ITEM _teb_roots "")
foreach(_teb_root IN LISTS _teb_roots)
  get_filename_component(_teb_root "${_teb_root}" REALPATH BASE_DIR "${CMAKE_BINARY_DIR}")
  if(IS_DIRECTORY "${_teb_root}" AND NOT _teb_root IN_LIST _teb_names)
    _teb_add_candidate(
      "${_teb_root}"
      "${_teb_root}/include;${_teb_root}/targets/${_teb_arch}-linux/include"
      "${_teb_root}/lib64;${_teb_root}/lib;${_teb_root}/targets/${_teb_arch}-linux/lib;${_teb_root}/lib/${_teb_arch}-linux-gnu")
  endif()
endforeach()

# Sets `result` to the first of `dirs` that holds `file`, or to "".
function(_teb_find_dir result file dirs)
  foreach(dir IN LISTS dirs)
    if(EXISTS "${dir}/${file}")
      set(${result} "${dir}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
  set(${result} "" PARENT_SCOPE)
endfunction()

# Sets `result` to the CUDA major version that the folder's cuda_runtime_api.h declares.
function(_teb_read_major result dir)
  file(STRINGS "${dir}/cuda_runtime_api.h" line REGEX "^#define CUDART_VERSION +[0-9]+" LIMIT_COUNT 1)
  string(REGEX REPLACE "[^0-9]" "" version "${line}")
  math(EXPR major "${version} / 1000")
  set(${result} "${major}" PARENT_SCOPE)
endfunction()

# Looks at one candidate. Sets _teb_why to what it lacks, or to "" and the CublasLt_* variables.
function(_teb_try_candidate includes libraries)
  _teb_find_dir(lt_dir cublasLt.h "${includes}")
  _teb_find_dir(rt_dir cuda_runtime_api.h "${includes}")
  set(why "")
  if(NOT lt_dir)
    set(why "no cublasLt.h")
  elseif(NOT rt_dir)
    set(why "no cuda_runtime_api.h")
  else()
    _teb_read_major(major "${rt_dir}")
    _teb_find_dir(lt_library_dir libcublasLt.so.${major} "${libraries}")
    _teb_find_dir(rt_library_dir libcudart.so.${major} "${libraries}")
    if(_teb_major AND NOT major EQUAL _teb_major)
      set(why "it is CUDA ${major}, and torch was built for CUDA ${_teb_torch_cuda}")
    elseif(NOT lt_library_dir)
      set(why "no libcublasLt.so.${major}")
    elseif(NOT rt_library_dir)
      set(why "no libcudart.so.${major}")
    else()
      _teb_find_dir(crt_dir crt/host_defines.h "${includes}")
      string(REPLACE "|" ";" others "${_teb_includes}")
      foreach(dir IN LISTS others)
        if(NOT crt_dir AND EXISTS "${dir}/crt/host_defines.h" AND EXISTS "${dir}/cuda_runtime_api.h")
          _teb_read_major(other_major "${dir}")
          if(other_major EQUAL major)
            set(crt_dir "${dir}")
          endif()
        endif()
      endforeach()
      if(NOT crt_dir)
        set(why "no crt/host_defines.h; `pip install nvidia-cuda-crt==${major}.*` brings it")
      endif()
    endif()
  endif()
  set(_teb_why "${why}" PARENT_SCOPE)
  if(NOT why)
    set(include_dirs "${lt_dir}" "${rt_dir}" "${crt_dir}")
    list(REMOVE_DUPLICATES include_dirs)
    set(CublasLt_INCLUDE_DIRS "${include_dirs}" PARENT_SCOPE)
    set(CublasLt_LIBRARIES "${lt_library_dir}/libcublasLt.so.${major}"
        "${rt_library_dir}/libcudart.so.${major}" PARENT_SCOPE)
  endif()
endfunction()

set(CublasLt_INCLUDE_DIRS "")
set(CublasLt_LIBRARIES "")
set(_teb_report "")
foreach(_teb_name _teb_include _teb_library IN ZIP_LISTS _teb_names _teb_includes _teb_libraries)
  string(REPLACE "|" ";" _teb_include "${_teb_include}")
  string(REPLACE "|" ";" _teb_library "${_teb_library}")
  _teb_try_candidate("${_teb_include}" "${_teb_library}")
  if(NOT _teb_why)
    message(STATUS "cuBLASLt: ${CublasLt_LIBRARIES}, headers in ${CublasLt_INCLUDE_DIRS}")
    break()
  endif()
  if(NOT _teb_name STREQUAL "/usr")
    message(STATUS "cuBLASLt: not ${_teb_name}: ${_teb_why}")
    string(APPEND _teb_report "\n  ${_teb_name}: ${_teb_why}")
  endif()
endforeach()

if(CublasLt_LIBRARIES)
  set(CublasLt_FOUND TRUE)
else()
  message(FATAL_ERROR "No cuBLASLt to build against. Looked at:${_teb_report}\n"
          "Build with the Python that has torch (its wheels bring cuBLASLt), or name a CUDA "
          "toolkit with -DTEB_CUDA_ROOT=/path or the environment variable TEB_CUDA_ROOT.")
endif()

if(NOT TARGET CublasLt::CublasLt)
  add_library(CublasLt::CublasLt INTERFACE IMPORTED)
  target_include_directories(CublasLt::CublasLt SYSTEM INTERFACE ${CublasLt_INCLUDE_DIRS})
  # The versioned files themselves: wheels have no unversioned names, and the linker then records
  # the libraries' own sonames, which are the ones torch has loaded.
  target_link_libraries(CublasLt::CublasLt INTERFACE ${CublasLt_LIBRARIES})
endif()
