{{- define "light-tts.name" -}}
{{ printf "%s" .Release.Name | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "light-tts.selector" -}}
app.kubernetes.io/name: light-tts
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "light-tts.labels" -}}
{{ include "light-tts.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "light-tts.voices" -}}
{{ .Values.voices.claim | default (ternary (printf "%s-voices" (include "light-tts.name" .)) "" .Values.voices.create) }}
{{- end }}
