{{- /*
A Service's name, and so without dots and with a letter first; short enough for what controllers
put behind it in a label: the number of a group of nodes, and a hash.
*/ -}}
{{- define "expertgate.name" -}}
{{- $name := .Release.Name | replace "." "-" -}}
{{- if .Values.fullnameOverride -}}
{{- $name = .Values.fullnameOverride -}}
{{- else if regexMatch "^[0-9]" $name -}}
{{- $name = printf "expertgate-%s" $name -}}
{{- else if not (contains "expertgate" $name) -}}
{{- $name = printf "%s-expertgate" $name -}}
{{- end -}}
{{- $name | trunc 49 | trimAll "-" -}}
{{- end -}}

{{- define "expertgate.selector" -}}
app.kubernetes.io/name: expertgate
app.kubernetes.io/instance: {{ quote .Release.Name }}
{{- end -}}

{{- define "expertgate.labels" -}}
{{ include "expertgate.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | replace "+" "_" | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "expertgate.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Of a quantity of Kubernetes', as those that the schema takes. */ -}}
{{- define "expertgate.amount" -}}
{{- $units := dict "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18 "Ki" 0x1p10 "Mi" 0x1p20 "Gi" 0x1p30 "Ti" 0x1p40 "Pi" 0x1p50 "Ei" 0x1p60 -}}
{{- $text := toString . -}}
{{- $unit := regexFind "[a-zA-Z]*$" $text -}}
{{- mulf (trimSuffix $unit $text) (get $units $unit | default 1) -}}
{{- end -}}

{{- /* expertgate.yaml. What the chart mounts and exposes, no value can move. */ -}}
{{- define "expertgate.config" -}}
{{- $engine := dict -}}
{{- if .Values.gpus -}}
{{- $_ := set $engine "tensor_parallel_size" (int .Values.gpus) -}}
{{- end -}}
{{- if .Values.multiNode.enabled -}}
{{- $_ := set $engine "pipeline_parallel_size" (int .Values.multiNode.size) -}}
{{- $_ := set $engine "distributed_executor_backend" "ray" -}}
{{- end -}}
{{- $own := dict "model" .Values.model.name "policies" "/etc/expertgate/policies" -}}
{{- $listed := kindIs "slice" .Values.suspended | ternary "/etc/expertgate/suspended" "/var/lib/expertgate" -}}
{{- $_ := set $own "suspended" (printf "%s/suspended.yaml" $listed) -}}
{{- $address := .Values.address | default "0.0.0.0" -}}
{{- $_ := set $own "host" $address -}}
{{- $_ := set $own "port" 8000 -}}
{{- if .Values.apiKeys.existingSecret -}}
{{- $_ := set $own "identity" (dict "api_keys" "/etc/expertgate/keys/keys.yaml") -}}
{{- end -}}
{{- $audit := dict "path" "/var/lib/expertgate/audit" -}}
{{- $signing := empty .Values.audit.signingKeySecret | not | ternary "/etc/expertgate/signing" "/var/lib/expertgate" -}}
{{- $_ := set $audit "signing_key" (printf "%s/audit-key.pem" $signing) -}}
{{- $_ := set $own "audit" $audit -}}
{{- with .Values.model.revision -}}
{{- $_ := set $own "revision" . -}}
{{- end -}}
{{- if or .Values.catalogue.content .Values.catalogue.existingConfigMap -}}
{{- $_ := set $own "catalogue" "/etc/expertgate/catalogue/experts.json" -}}
{{- end -}}
{{- if .Values.admin.existingSecret -}}
{{- $_ := set $own "admin" (dict "listen" (printf "%s:9100" (eq $address "::" | ternary "[::]" $address)) "token" "/etc/expertgate/admin/token") -}}
{{- end -}}
{{- $_ := set $own "engine" (mergeOverwrite $engine (deepCopy (.Values.engine | default dict))) -}}
{{- toYaml (mergeOverwrite (deepCopy (.Values.config | default dict)) $own) -}}
{{- end -}}

{{- /* What the public listener speaks. */ -}}
{{- define "expertgate.scheme" -}}
{{- dig "tls" nil (.Values.config | default dict) | empty | ternary "http" "https" -}}
{{- end -}}

{{- /* What clients ask for. The rest of the public listener is for probes inside the cluster. */ -}}
{{- define "expertgate.paths" -}}
/.well-known/expertgate-keys: Exact
/detokenize: Exact
/tokenize: Exact
/v1: Prefix
{{- end -}}

{{- define "expertgate.target" -}}
{{- if .Values.multiNode.enabled -}}
{apiVersion: leaderworkerset.x-k8s.io/v1, kind: LeaderWorkerSet, name: {{ include "expertgate.name" . }}}
{{- else -}}
{apiVersion: apps/v1, kind: StatefulSet, name: {{ include "expertgate.name" . }}}
{{- end -}}
{{- end -}}
